// The stage: the picture, with hands that a person can drag. The server computes where the fingers go.

import { $, ask, plain } from "./server.js";

export const COLOURS = ["#e63c3c", "#dcbe1e", "#3cbe46", "#2896e6", "#be50dc"]; // thumb to little finger
export const NAMES = ["thumb", "index finger", "middle finger", "ring finger", "little finger"];
export const PARTS = ["root", "middle joint", "end joint", "tip"];
export const SIDES = ["left", "right"];
// The server's gestures -> their names in the demo's prompts.
export const GESTURES = {
  fist: "fist", open_hand: "open hand", spread_fingers: "spread fingers", pointing: "pointing", victory: "peace sign",
  three_fingers: "three fingers", four_fingers: "four fingers", thumbs_up: "thumbs up", thumbs_down: "thumbs down",
  ok_sign: "OK sign", call_me: "call me sign", horns: "sign of the horns", love_you: "I love you sign",
  pinky_up: "pinky up", finger_gun: "finger gun", pinch: "pinch", claw: "claw", cupped_hand: "cupped hand",
  crossed_fingers: "crossed fingers", vulcan: "vulcan salute", c_shape: "C shape",
  three_with_thumb: "three with the thumb", tucked_thumb: "thumb tucked", pinched_fingers: "pinched fingers",
};

export const state = {
  model: null, // the answer of v1/models
  hands: null, // on the stage, as the server sends them: an object, or a list with one for each of several people
  undo: [],
  image: null, // data URL of the picture on the stage
  request: null, // the body that asks for the picture on the stage
  running: null, // the run of the page, or null
};

// ---------------------------------------------------------------- hands

// The hands of all people, from left to right: { hands, person, s }; s is 0 for the left hand, and 1 for the right.
const people = (hands) => (Array.isArray(hands) ? hands : hands ? [hands] : []);
const all = (hands) => people(hands).flatMap((one, person) => SIDES.map((_, s) => ({ hands: one, person, s })));
const visible = ({ hands, s }) => hands.visibility[s] >= 0.5;

// The joints are buttons over the picture: Tab reaches them, arrow keys and the mouse move them.
const joints = [];
const lines = [];

// The joints and bones of one more hand.
function add(person, s) {
  const side = SIDES[s];
  const whose = person ? `, person ${person + 1}` : "";
  joints.push(Array.from({ length: 21 }, (_, j) => {
    const joint = document.createElement("button");
    const finger = Math.floor((j - 1) / 4);
    joint.type = "button";
    joint.hidden = true;
    joint.className = j % 4 === 1 && j > 1 ? "joint root" : "joint";
    joint.dataset.side = side;
    joint.dataset.joint = j;
    joint.dataset.person = person;
    joint.style.setProperty("--finger", j ? COLOURS[finger] : "#ffffff");
    const name = (j ? `${side} ${NAMES[finger]}, ${PARTS[(j - 1) % 4]}` : `${side} wrist`) + whose;
    joint.setAttribute("aria-label", name);
    joint.title = name;
    if (!j) joint.dataset.letter = (side === "left" ? "L" : "R") + (person ? person + 1 : "");
    // The root of a finger or thumb does not move by itself.
    if ((j - 1) % 4 === 0 && j) joint.tabIndex = -1;
    joint.addEventListener("pointerdown", (event) => hold(event, person, s, j));
    joint.addEventListener("keydown", (event) => nudge(event, person, s, j));
    $("canvas").append(joint);
    return joint;
  }));
  lines.push(["under", "bone"].map((kind) =>
    COLOURS.map((colour) => {
      const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      line.setAttribute("class", kind);
      if (kind === "bone") line.setAttribute("stroke", colour);
      $("bones").append(line);
      return line;
    }),
  ));
}
SIDES.forEach((_, s) => add(0, s));

const radio = (side) => document.querySelector(`input[name=side][value=${side}]`);
const whose = () => Number($("person").value || 0);

export function setHands(hands, fresh = true) {
  state.hands = hands;
  if (fresh) state.undo = [];
  $("editor").disabled = !hands;
  const there = people(hands);
  while (joints.length < 2 * there.length) add(joints.length >> 1, joints.length % 2);
  if ($("person").options.length !== there.length) {
    $("person").replaceChildren(...there.map((_, i) => new Option(`Person ${i + 1}`, i)));
  }
  $("person").hidden = there.length < 2;
  // A person who shows no hand cannot be edited.
  there.forEach((one, i) => ($("person").options[i].disabled = !one.visibility.some((seen) => seen >= 0.5)));
  if ($("person").selectedOptions[0]?.disabled) {
    const first = [...$("person").options].findIndex((option) => !option.disabled);
    $("person").value = Math.max(first, 0);
  }
  choose();
  draw();
}

// What the editor offers for the chosen person's hands.
function choose() {
  const one = people(state.hands)[whose()];
  const seen = one ? SIDES.filter((_, s) => one.visibility[s] >= 0.5) : [];
  // A hand that is not on the stage cannot be edited.
  SIDES.forEach((side) => (radio(side).disabled = seen.length > 0 && !seen.includes(side)));
  if (seen.length === 1) radio(seen[0]).checked = true;
  $("swap").disabled = seen.length < 2;
}

export function draw() {
  const hands = all(state.hands);
  const on = $("showbones").checked;
  $("undo").disabled = !state.undo.length;
  $("hint").hidden = Boolean(state.hands || state.image || state.running);
  joints.forEach((_, h) => {
    const seen = on && hands[h] && visible(hands[h]);
    const points = seen && hands[h].hands.joints_2d[hands[h].s];
    joints[h].forEach((joint, j) => {
      joint.hidden = !seen;
      if (!seen) return;
      const [x, y] = points[j];
      joint.style.left = `${100 * x}%`;
      joint.style.top = `${100 * y}%`;
    });
    lines[h].forEach((kind) =>
      kind.forEach((line, finger) => {
        const chain = seen ? [0, 1, 2, 3, 4].map((k) => points[k && 4 * finger + k]) : [];
        line.setAttribute("points", chain.map((point) => point.join(",")).join(" "));
      }),
    );
  });
}

// One edit runs at a time. Of the edits that come meanwhile only the last one counts.
let editing = false;
let waiting = null;

async function edit(change, base) {
  if (editing) {
    waiting = [change, base];
    return;
  }
  editing = true;
  try {
    const answer = await ask("v1/hands/edit", { hands: base ?? state.hands, ...change });
    state.hands = (await answer.json()).hands;
    draw();
    if (!state.running) setState("Edited. Paint again to see it.");
  } catch (error) {
    failed(error);
  }
  editing = false;
  if (waiting) {
    const [next, from] = waiting;
    waiting = null;
    await edit(next, from);
  }
}

function keepForUndo() {
  state.undo.push(state.hands);
  if (state.undo.length > 50) state.undo.shift();
  $("undo").disabled = false;
}

function place(event) {
  const box = $("canvas").getBoundingClientRect();
  const within = (value) => Math.min(1.5, Math.max(-0.5, value));
  return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
}

// From here on, gestures are for this hand.
function mark(person, s) {
  $("person").value = person;
  choose();
  radio(SIDES[s]).checked = true;
}

function hold(event, person, s, j) {
  if (event.button) return;
  event.preventDefault();
  const joint = joints[2 * person + s][j];
  const base = state.hands;
  let moved = false;
  joint.focus();
  joint.setPointerCapture(event.pointerId);
  joint.classList.add("held");
  mark(person, s);
  const move = (event) => {
    if (!moved) keepForUndo();
    moved = true;
    const [x, y] = place(event);
    // Starts from the hand before the drag: a drag there and back changes nothing.
    edit({ person, drags: [{ hand: SIDES[s], joint: j, x, y }] }, base);
  };
  const drop = () => {
    joint.classList.remove("held");
    joint.removeEventListener("pointermove", move);
  };
  joint.addEventListener("pointermove", move);
  joint.addEventListener("lostpointercapture", drop, { once: true });
}

function nudge(event, person, s, j) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!by) return;
  event.preventDefault();
  if (editing) return;
  keepForUndo();
  const far = event.shiftKey ? 0.05 : 0.015;
  const [x, y] = people(state.hands)[person].joints_2d[s][j];
  edit({ person, drags: [{ hand: SIDES[s], joint: j, x: x + far * by[0], y: y + far * by[1] }] });
}

function change(what) {
  if (!state.hands || editing) return;
  keepForUndo();
  edit({ person: whose(), ...what }).then(() => setHands(state.hands, false));
}

export function undo() {
  if (!state.undo.length) return;
  setHands(state.undo.pop(), false);
}

// ---------------------------------------------------------------- the view

export function show(image, waiting = false) {
  state.image = image;
  const picture = $("picture");
  if (image) picture.src = image;
  picture.alt = image ? `Picture: ${state.request?.prompt ?? ""}` : "";
  picture.classList.remove("old");
  picture.classList.toggle("waiting", waiting);
  picture.hidden = !image || !$("showpicture").checked;
  $("save").hidden = !image || waiting;
  if (image) $("save").href = image;
  draw();
}

// On a telephone the stage may be above the visible part of the page.
export function toStage() {
  const box = $("stage").getBoundingClientRect();
  const result = $("result").getBoundingClientRect();
  if (box.top >= 0 && result.bottom <= innerHeight) return;
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("stage").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
}

export function setState(words) {
  $("state").textContent = words;
}

// Text for screen readers, without every step.
export function announce(words) {
  $("announce").textContent = words;
}

export function say(sentence) {
  $("message").textContent = sentence;
  $("message").hidden = !sentence;
  if (sentence) $("message").scrollIntoView({ block: "nearest" });
}

export function note(sentences) {
  const lines = [...new Set(sentences)].map((sentence) => {
    const line = document.createElement("p");
    line.textContent = plain(sentence);
    return line;
  });
  $("notes").replaceChildren(...lines);
  $("notes").hidden = !lines.length;
}

export function failed(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) $("keybox").open = true;
  say(error.message);
}

$("undo").addEventListener("click", undo);
$("drop").addEventListener("click", () => setHands(null));
$("mirror").addEventListener("click", () => change({ mirror: true }));
$("swap").addEventListener("click", () => change({ swap: true }));
$("gesture").addEventListener("change", (event) => {
  const hand = document.querySelector("input[name=side]:checked").value;
  if (event.target.value) change({ gesture: { hand, name: event.target.value } });
  event.target.value = "";
});
$("person").addEventListener("change", choose);
$("showbones").addEventListener("change", draw);
$("showpicture").addEventListener("change", () => {
  $("picture").hidden = !state.image || !$("showpicture").checked;
});
