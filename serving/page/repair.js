// Repairing a picture: its hands as skeletons over it, which a person drags, places and paints again.

import * as brush from "./brush.js";
import { arriving, chosen, loaded, noted, photo, places, said, sideOf, tell, words, wrong } from "./photo.js";
import { drawBox, isPlacing, placing } from "./place.js";
import { $, ask, picture } from "./server.js";
import { COLOURS, NAMES, PARTS, SIDES } from "./stage.js";

const NEAR = 0.55; // of the stage, that a hand takes when the view zooms to it
const SMALL = 0.3; // of the picture: the view zooms to smaller hands by itself
const MAX_UNDO = 30;
const EDITS = "v1/images/edits";
const PREVIEWS = 6;
const TURN = 15; // degrees of a click
const GROW = 1.1;
const LEAST = 8; // pixels of a box

export function mode(repairing) {
  $("painting").hidden = repairing;
  $("repairing").hidden = !repairing;
  $("topaint").setAttribute("aria-current", !repairing);
  $("torepair").setAttribute("aria-current", repairing);
  if (repairing) draw();
}

// ---------------------------------------------------------------- a picture comes in

async function open(file) {
  mode(true);
  stop();
  said("");
  noted([]);
  const url = URL.createObjectURL(file);
  let image;
  try {
    image = await loaded(url);
  } catch (error) {
    URL.revokeObjectURL(url);
    return said(error.message);
  }
  forget();
  Object.assign(photo, {
    file, url, first: url, width: image.naturalWidth, height: image.naturalHeight, hands: [], chosen: -1, strokes: [],
    undo: [], zoomed: false,
  });
  $("photo").style.setProperty("--shape", photo.width / photo.height);
  $("slider").value = 0;
  brush.resize(photo.width, photo.height);
  draw();
  await find();
}

// Frees the pictures that neither the stage nor a step back needs.
function forget() {
  for (const url of new Set([photo.first, photo.url, ...photo.undo.map((step) => step.url)])) if (url) URL.revokeObjectURL(url);
}

async function find() {
  const run = start("Looking for hands …");
  try {
    const { data } = await (await ask("v1/hands/detect", form({}), run.signal)).json();
    if (!ended(run)) return;
    photo.hands = data;
    choose(data.length ? 0 : -1);
    tell(data.length ? `Found ${data.length === 1 ? "a hand" : `${data.length} hands`}` : "No hand was found. Place one.");
  } catch (error) {
    if (ended(run)) tell("");
    wrong(error);
  }
  draw();
}

function form(fields, extra = {}) {
  const body = new FormData();
  body.append("image", photo.file, "picture");
  for (const [name, value] of Object.entries(fields)) body.append(name, value);
  for (const [name, blob] of Object.entries(extra)) body.append(name, blob, name);
  return body;
}

function start(sentence) {
  stop();
  const controller = new AbortController();
  const run = { signal: controller.signal, abort: () => controller.abort(), began: performance.now() };
  photo.running = run;
  said("");
  noted([]);
  tell(sentence);
  $("repairprogress").removeAttribute("value");
  draw();
  return run;
}

function ended(run) {
  if (photo.running !== run) return false;
  photo.running = photo.preview = null;
  $("repairprogress").value = 0;
  return true;
}

function stop() {
  const run = photo.running;
  if (!run) return;
  ended(run);
  run.abort();
  tell("Stopped");
  draw();
}

// ---------------------------------------------------------------- the view

const joints = Array.from({ length: 21 }, (_, j) => {
  const joint = document.createElement("button");
  joint.type = "button";
  joint.className = j % 4 === 1 && j > 1 ? "joint root" : "joint";
  joint.style.setProperty("--finger", j ? COLOURS[Math.floor((j - 1) / 4)] : "#ffffff");
  joint.title = j ? `${NAMES[Math.floor((j - 1) / 4)]}, ${PARTS[(j - 1) % 4]}` : "wrist: moves the whole hand";
  joint.setAttribute("aria-label", joint.title);
  if (j && (j - 1) % 4 === 0) joint.tabIndex = -1;
  joint.addEventListener("pointerdown", (event) => hold(event, j));
  joint.addEventListener("keydown", (event) => nudge(event, j));
  $("plane").append(joint);
  return joint;
});

function view() {
  const hand = chosen();
  if (!photo.zoomed || !hand) return { x: 0, y: 0, k: 1 };
  const points = [...places(hand), ...(hand.points ?? [])];
  const [low, high] = [Math.min, Math.max].map((pick) => [0, 1].map((axis) => pick(...points.map((point) => point[axis]))));
  const k = Math.min(40, Math.max(1, NEAR / Math.max(high[0] - low[0], high[1] - low[1], 1e-6)));
  const at = (axis) => Math.min(1 - 1 / k, Math.max(0, (low[axis] + high[axis]) / 2 - 0.5 / k));
  return { x: at(0), y: at(1), k };
}

let seen = { x: 0, y: 0, k: 1 };

function look() {
  seen = view();
  const plane = $("plane").style;
  plane.width = plane.height = `${100 * seen.k}%`;
  plane.left = `${-100 * seen.k * seen.x}%`;
  plane.top = `${-100 * seen.k * seen.y}%`;
  cut();
}

// The slider's place is one of the view, not of the whole picture.
function cut() {
  $("plane").style.setProperty("--cut", `${100 * (seen.x + $("slider").value / 100 / seen.k)}%`);
}

function draw() {
  const there = Boolean(photo.file);
  const hand = chosen();
  const busy = Boolean(photo.running);
  $("drophere").hidden = there;
  for (const id of ["other", "saverepair"]) $(id).hidden = !there;
  $("before").hidden = !there;
  if (there && $("before").getAttribute("src") !== photo.first) $("before").src = photo.first;
  const repaired = there && photo.url !== photo.first;
  const shown = photo.preview ?? (repaired ? photo.url : null);
  $("after").hidden = !shown;
  $("compare").hidden = !repaired || busy;
  $("plane").classList.toggle("compared", Boolean(shown));
  $("saverepair").hidden = !repaired || busy;
  if (shown && $("after").getAttribute("src") !== shown) $("after").src = shown;
  if (repaired) $("saverepair").href = photo.url;
  $("handtools").disabled = !there;
  $("handhint").textContent = !there
    ? "Choose a picture first."
    : hand
      ? "Drag a joint, or choose one with Tab and move it with the arrow keys. The wrist moves the hand."
      : "Place a hand over the one to repair, then move it by its wrist.";
  $("ofhand").hidden = !hand;
  $("zoom").disabled = !hand;
  $("zoom").textContent = photo.zoomed ? "Whole picture" : "Zoom to the hand";
  $("repairone").hidden = busy;
  $("repairone").disabled = !hand;
  $("repairall").hidden = busy || photo.hands.length < 2;
  $("repairstop").hidden = !busy;
  $("repairundo").disabled = !photo.undo.length || busy;
  for (const id of ["place", "flip", "over", "turnleft", "turnright", "smaller", "larger", "remove", "repairgesture"]) $(id).disabled = busy;
  $("clearbrush").hidden = !photo.strokes.length;
  look();
  bones();
  list();
  brush.paint(photo.strokes);
}

function bones() {
  const on = $("showskeletons").checked && photo.file;
  const lines = [];
  photo.hands.forEach((hand, i) => {
    const points = places(hand);
    for (const kind of ["under", "bone"]) {
      COLOURS.forEach((colour, finger) => {
        const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
        const chain = [0, 1, 2, 3, 4].map((k) => points[k && 4 * finger + k]);
        line.setAttribute("points", chain.map((point) => point.join(",")).join(" "));
        line.setAttribute("class", `${kind}${kind === "bone" && i === photo.chosen ? " chosen" : ""}`);
        if (kind === "bone") line.setAttribute("stroke", colour);
        line.addEventListener("click", () => isPlacing() || choose(i));
        lines.push(line);
      });
    }
  });
  $("skeletons").replaceChildren(...(on ? lines : []));
  const hand = chosen();
  const grips = on && hand && !photo.running && !$("scene").classList.contains("brushing");
  joints.forEach((joint, j) => {
    joint.hidden = !grips;
    if (!grips) return;
    const [x, y] = places(hand)[j];
    joint.style.left = `${100 * x}%`;
    joint.style.top = `${100 * y}%`;
    if (!j) joint.dataset.letter = hand.side === "left" ? "L" : "R";
  });
}

function list() {
  const rows = photo.hands.map((hand, i) => {
    const label = document.createElement("label");
    const radio = document.createElement("input");
    Object.assign(radio, { type: "radio", name: "hand", checked: i === photo.chosen });
    radio.addEventListener("change", () => choose(i));
    const sure = hand.sureness === null ? "" : `, ${Math.round(100 * hand.sureness)} % sure`;
    const gesture = hand.gesture ? `, ${words(hand.gesture)}` : "";
    label.className = "switch";
    label.append(radio, `${hand.side === "left" ? "Left" : "Right"} hand${gesture}${sure}`);
    return label;
  });
  const focused = $("handlist").contains(document.activeElement);
  $("handlist").replaceChildren(...rows);
  if (focused) rows[photo.chosen]?.querySelector("input").focus();
}

function choose(i) {
  photo.chosen = i;
  const hand = chosen();
  if (hand) {
    const points = places(hand);
    const wide = (axis) => Math.max(...points.map((point) => point[axis])) - Math.min(...points.map((point) => point[axis]));
    photo.zoomed = Math.max(wide(0), wide(1)) < SMALL;
  }
  draw();
}

// ---------------------------------------------------------------- changes, and back

function keep() {
  const { file, url, hands, chosen, strokes } = photo;
  photo.undo.push({ file, url, hands: hands.map((hand) => ({ ...hand })), chosen, strokes: [...strokes] });
  if (photo.undo.length > MAX_UNDO) photo.undo.shift();
}

function back() {
  if (!photo.undo.length || photo.running) return;
  Object.assign(photo, photo.undo.pop());
  tell("Taken back");
  draw();
}

// One change runs at a time. Of those that come meanwhile only the last one counts.
let editing = false;
let waiting = null;

async function edit(hand, change, base) {
  if (editing) {
    waiting = [hand, change, base];
    return;
  }
  editing = true;
  try {
    const { hands } = await (await ask("v1/hands/edit", { hands: base ?? hand.hands, ...change })).json();
    hand.hands = hands;
    hand.side = SIDES[sideOf(hands)];
    hand.sureness = null; // a person says so now
    if (change.gesture) hand.gesture = change.gesture.name;
    else if (change.drags?.some((drag) => drag.joint)) hand.gesture = null;
    tell("");
    if (change.drags) {
      bones();
      list();
    } else draw();
  } catch (error) {
    wrong(error);
  }
  editing = false;
  if (waiting) {
    const next = waiting;
    waiting = null;
    await edit(...next);
  }
}

function change(what) {
  const hand = chosen();
  if (!hand || editing || photo.running) return;
  keep();
  edit(hand, what);
}

function place(event) {
  const box = $("plane").getBoundingClientRect();
  const within = (value) => Math.min(1.5, Math.max(-0.5, value));
  return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
}

function hold(event, j) {
  if (event.button) return;
  event.preventDefault();
  const joint = joints[j];
  const hand = chosen();
  const base = hand.hands;
  let moved = false;
  joint.focus({ preventScroll: true });
  joint.setPointerCapture(event.pointerId);
  joint.classList.add("held");
  const move = (event) => {
    if (!moved) keep();
    moved = true;
    const [x, y] = place(event);
    edit(hand, { drags: [{ hand: hand.side, joint: j, x, y }] }, base);
  };
  joint.addEventListener("pointermove", move);
  joint.addEventListener(
    "lostpointercapture",
    () => {
      joint.classList.remove("held");
      joint.removeEventListener("pointermove", move);
    },
    { once: true },
  );
}

function nudge(event, j) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!by || editing || photo.running) return;
  event.preventDefault();
  keep();
  const hand = chosen();
  const far = (event.shiftKey ? 0.05 : 0.015) / seen.k;
  const [x, y] = places(hand)[j];
  edit(hand, { drags: [{ hand: hand.side, joint: j, x: x + far * by[0], y: y + far * by[1] }] });
}

// box: [left, top, right, bottom] in [0, 1]. The server looks there first, and places a hand if it finds none.
async function placeHand(box) {
  const run = start("Looking there …");
  try {
    const fields = { box: JSON.stringify(box), side: "right" };
    const { data } = await (await ask("v1/hands/detect", form(fields), run.signal)).json();
    if (!ended(run)) return;
    keep();
    const found = data[0].sureness !== null;
    photo.hands = [...photo.hands, { ...data[0], points: found ? data[0].points : null }];
    choose(photo.hands.length - 1);
    tell(found ? "Found a hand there" : "Placed a hand. Drag its wrist and joints over the hand to repair.");
  } catch (error) {
    if (ended(run)) tell("");
    wrong(error);
  }
  draw();
}

// A square in the middle of the view.
function middleBox() {
  const { x, y, k } = seen;
  const ratio = photo.width / photo.height;
  const [half, tall] = [0.2 * Math.min(1, 1 / ratio), 0.2 * Math.min(1, ratio)].map((size) => size / k);
  return [x + 0.5 / k - half, y + 0.5 / k - tall, x + 0.5 / k + half, y + 0.5 / k + tall];
}

// ---------------------------------------------------------------- repairing

async function repair(which) {
  if (!which.length) return;
  const run = start(which.length > 1 ? "Repairing the hands …" : "Repairing the hand …");
  const fields = { repair: "true", stream: "true", partial_images: PREVIEWS };
  fields.hands = JSON.stringify(
    which.map(({ hands, points, gesture }) => ({ ...hands, ...(points ? { old: points } : {}), ...(gesture ? { gesture } : {}) })),
  );
  const given = { prompt: $("repairprompt").value.trim(), strength: $("strength").value, seed: $("repairseed").value };
  for (const [name, value] of Object.entries(given)) if (value) fields[name] = value;
  try {
    const extra = photo.strokes.length ? { mask: await brush.mask(photo.width, photo.height) } : {};
    let answer;
    for await (answer of picture(form(fields, extra), run.signal, EDITS)) {
      if (answer.kind !== "preview" || photo.running !== run) continue;
      photo.preview = `data:image/png;base64,${answer.b64_json}`;
      $("repairprogress").value = answer.step / answer.steps;
      draw();
    }
    const bytes = Uint8Array.from(atob(answer.b64_json), (letter) => letter.charCodeAt(0));
    const file = new Blob([bytes], { type: "image/png" });
    if (!ended(run)) return;
    keep();
    photo.file = file;
    photo.url = URL.createObjectURL(file);
    photo.strokes = [];
    photo.hands = photo.hands.map((hand) => (which.includes(hand) ? { ...hand, points: places(hand) } : hand));
    $("slider").value = 0;
    $("showskeletons").checked = false;
    noted(answer.warnings ?? []);
    tell(`Done in ${((performance.now() - run.began) / 1000).toFixed(1)} s, seed ${answer.seed}`);
  } catch (error) {
    if (ended(run)) tell("");
    wrong(error);
  }
  draw();
}

// ---------------------------------------------------------------- beginning

$("topaint").addEventListener("click", () => mode(false));
$("torepair").addEventListener("click", () => mode(true));
$("file").addEventListener("change", (event) => {
  if (event.target.files[0]) open(event.target.files[0]);
  event.target.value = "";
});
$("other").addEventListener("click", () => $("file").click());
$("slider").addEventListener("input", cut);
$("showskeletons").addEventListener("change", bones);
$("zoom").addEventListener("click", () => {
  photo.zoomed = !photo.zoomed;
  draw();
});
$("repairgesture").addEventListener("change", (event) => {
  if (event.target.value && chosen()) change({ gesture: { hand: chosen().side, name: event.target.value } });
  event.target.value = "";
});
$("flip").addEventListener("click", () => change({ flip: true }));
$("over").addEventListener("click", () => change({ over: true }));
$("turnleft").addEventListener("click", () => change({ turn: -TURN }));
$("turnright").addEventListener("click", () => change({ turn: TURN }));
$("smaller").addEventListener("click", () => change({ scale: 1 / GROW }));
$("larger").addEventListener("click", () => change({ scale: GROW }));
$("remove").addEventListener("click", () => {
  keep();
  photo.hands = photo.hands.filter((_, i) => i !== photo.chosen);
  choose(photo.hands.length - 1);
});
$("place").addEventListener("click", () => {
  const again = $("place").getAttribute("aria-pressed") === "true";
  placing(!again);
  if (again) placeHand(middleBox());
  else tell("Draw a box over the hand. Press the button again to place one in the middle.");
});
$("scene").addEventListener("pointerdown", (event) => {
  if (photo.running || !photo.file) return;
  drawBox(event, place, (box) => {
    if (box && Math.min((box[2] - box[0]) * photo.width, (box[3] - box[1]) * photo.height) >= LEAST) placeHand(box);
    else tell("The box is too small. Draw a larger one.");
  });
});
$("brush").addEventListener("click", () => {
  const on = $("brush").getAttribute("aria-pressed") !== "true";
  placing(false);
  $("brush").setAttribute("aria-pressed", on);
  $("scene").classList.toggle("brushing", on);
  $("brushsizes").hidden = !on;
  draw();
});
$("brushed").addEventListener("pointerdown", (event) => {
  if (event.button || photo.running) return;
  event.preventDefault();
  keep();
  const stroke = { size: Number($("brushsize").value) / 100 / seen.k, points: [place(event)] };
  photo.strokes = [...photo.strokes, stroke];
  brush.follow(event, stroke, place, photo.strokes, draw);
});
$("clearbrush").addEventListener("click", () => {
  keep();
  photo.strokes = [];
  draw();
});
$("repairundo").addEventListener("click", back);
$("repairone").addEventListener("click", () => repair([chosen()]));
$("repairall").addEventListener("click", () => repair(photo.hands));
$("repairstop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if ($("repairing").hidden) return;
  const typing = ["TEXTAREA", "INPUT"].includes(document.activeElement.tagName) && !["radio", "checkbox", "range"].includes(document.activeElement.type);
  if (event.key === "Escape") stop();
  else if (event.key === "z" && (event.ctrlKey || event.metaKey) && !typing) {
    event.preventDefault();
    back();
  }
});

arriving(open, (sentence) => {
  mode(true);
  said(sentence);
});

export function offer(gestures) {
  $("repairgesture").replaceChildren(new Option("Choose a gesture", ""), ...gestures.map((name) => new Option(words(name), name)));
}
draw();
