// The page: asks hd-serve for pictures, shows what comes in, and lets hands be moved. Nothing in here comes from elsewhere.

const $ = (id) => document.getElementById(id);
const COLOURS = ["#e63c3c", "#dcbe1e", "#3cbe46", "#2896e6", "#be50dc"]; // thumb to little finger
const NAMES = ["thumb", "index finger", "middle finger", "ring finger", "little finger"];
const PARTS = ["root", "middle joint", "end joint", "tip"];
const SIDES = ["left", "right"];
const PREVIEWS = 9;

const state = {
  model: null, // what /v1/models says
  hands: null, // those on the stage, as the server gives them
  edited: false, // whether they are to be sent
  undo: [],
  image: null, // data URL of the picture on the stage
  request: null, // what was sent last
  history: [],
  current: -1,
  running: null, // AbortController
};

// ---------------------------------------------------------------- asking

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: headers(),
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) $("keybox").open = true;
  let sentence = `The server answered ${answer.status}.`;
  try {
    sentence = (await answer.json()).error.message;
  } catch {
    // no JSON: the status is all there is
  }
  const after = answer.headers.get("Retry-After");
  throw new Error(after ? `${sentence} (in about ${after} s)` : sentence);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(6)).join("\n"));
    }
  }
}

// ---------------------------------------------------------------- painting

function wanted(withHands) {
  const body = { prompt: $("prompt").value.trim() };
  if (!$("seed").value) $("seed").value = Math.floor(Math.random() * 1e6);
  body.seed = Number($("seed").value);
  if ($("steps").value) body.num_inference_steps = Number($("steps").value);
  if ($("guidance").value) body.guidance_scale = Number($("guidance").value);
  if ($("solver").value) body.solver = $("solver").value;
  if (withHands && state.hands) body.hands = state.hands;
  return body;
}

async function paint(withHands) {
  if (!$("form").reportValidity()) return;
  stop();
  const body = wanted(withHands);
  const running = (state.running = new AbortController());
  const started = performance.now();
  state.request = body;
  busy(true);
  say("");
  setState(withHands ? "painting these hands" : "making hands");
  if (!withHands) setHands(null);
  $("progress").removeAttribute("value");
  try {
    const sent = { ...body, stream: true, partial_images: PREVIEWS, return_hands: true };
    const answer = await ask("/v1/images/generations", sent, running.signal);
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.type === "image_generation.partial_image") {
        if (event.kind === "hands") {
          if (!withHands) setHands(event.hands);
          setState("painting");
          $("progress").value = 0.04;
        } else {
          show(`data:image/png;base64,${event.b64_json}`, true);
          $("progress").value = event.step / event.steps;
          setState(`step ${event.step} of ${event.steps}`);
        }
      } else if (event.type === "image_generation.completed") {
        const image = `data:image/png;base64,${event.b64_json}`;
        show(image, false);
        setHands(event.hands, false);
        $("progress").value = 1;
        setState(`${((performance.now() - started) / 1000).toFixed(1)} s, seed ${event.seed}`);
        if (event.warnings) say(event.warnings.join(" "));
        remember({ image, hands: event.hands, request: { ...body, seed: event.seed } });
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
    setState(error.name === "AbortError" ? "stopped" : "");
    $("progress").value = 0;
  } finally {
    if (state.running === running) {
      state.running = null;
      busy(false);
    }
  }
}

async function onlyHands() {
  if (!$("form").reportValidity()) return;
  stop();
  say("");
  const { prompt, seed } = wanted(false);
  try {
    const { data } = await (await ask("/v1/hands", { prompt, seed })).json();
    show(null);
    setHands(data[0].hands);
    state.request = wanted(true);
    $("progress").value = 0;
    setState(`hands of seed ${seed}`);
    busy(false);
  } catch (error) {
    say(error.message);
  }
}

function stop() {
  if (state.running) state.running.abort();
  state.running = null;
  busy(false);
}

// ---------------------------------------------------------------- hands

// The joints are buttons over the picture: they can be reached with Tab, moved with arrow keys, and dragged.
const joints = SIDES.map((side, s) =>
  Array.from({ length: 21 }, (_, j) => {
    const joint = document.createElement("button");
    const finger = Math.floor((j - 1) / 4);
    joint.type = "button";
    joint.hidden = true;
    joint.className = j % 4 === 1 && j > 1 ? "joint root" : "joint";
    joint.dataset.side = side;
    joint.dataset.joint = j;
    joint.style.setProperty("--finger", j ? COLOURS[finger] : "#ffffff");
    const name = j ? `${side} ${NAMES[finger]}, ${PARTS[(j - 1) % 4]}` : `${side} wrist`;
    joint.setAttribute("aria-label", name);
    joint.title = name;
    if (!j) joint.dataset.letter = side === "left" ? "L" : "R";
    // A finger's root sits in the palm and does not move by itself; the thumb's does not either.
    if ((j - 1) % 4 === 0 && j) joint.tabIndex = -1;
    joint.addEventListener("pointerdown", (event) => hold(event, s, j));
    joint.addEventListener("keydown", (event) => nudge(event, s, j));
    $("canvas").append(joint);
    return joint;
  }),
);
const lines = SIDES.map(() =>
  ["under", "bone"].map((kind) =>
    COLOURS.map((colour) => {
      const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
      line.setAttribute("class", kind);
      if (kind === "bone") line.setAttribute("stroke", colour);
      $("bones").append(line);
      return line;
    }),
  ),
);

function setHands(hands, fresh = true) {
  state.hands = hands;
  if (fresh) state.undo = [];
  $("editor").disabled = !hands;
  const seen = hands ? SIDES.filter((_, s) => hands.visibility[s] >= 0.5) : [];
  if (seen.length === 1) document.querySelector(`input[name=side][value=${seen[0]}]`).checked = true;
  $("swap").disabled = seen.length < 2;
  draw();
}

function draw() {
  const hands = state.hands;
  const on = hands && $("showbones").checked;
  $("undo").disabled = !state.undo.length;
  $("hint").hidden = Boolean(hands || state.image);
  SIDES.forEach((_, s) => {
    const seen = on && hands.visibility[s] >= 0.5;
    joints[s].forEach((joint, j) => {
      joint.hidden = !seen;
      if (!seen) return;
      const [x, y] = hands.joints_2d[s][j];
      joint.style.left = `${100 * x}%`;
      joint.style.top = `${100 * y}%`;
    });
    lines[s].forEach((kind) =>
      kind.forEach((line, finger) => {
        const chain = seen ? [0, 1, 2, 3, 4].map((k) => hands.joints_2d[s][k && 4 * finger + k]) : [];
        line.setAttribute("points", chain.map((point) => point.join(",")).join(" "));
      }),
    );
  });
}

// One edit is under way at a time; of those that come meanwhile only the last counts.
let editing = false;
let waiting = null;

async function edit(change, base) {
  if (editing) {
    waiting = [change, base];
    return;
  }
  editing = true;
  try {
    const answer = await ask("/v1/hands/edit", { hands: base ?? state.hands, ...change });
    state.hands = (await answer.json()).hands;
    draw();
  } catch (error) {
    say(error.message);
  }
  editing = false;
  if (waiting) {
    const [next, from] = waiting;
    waiting = null;
    await edit(next, from);
  } else if (!state.running) {
    setState("edited; paint again to see it");
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

function hold(event, s, j) {
  if (event.button) return;
  event.preventDefault();
  const joint = joints[s][j];
  const base = state.hands;
  let moved = false;
  joint.focus();
  joint.setPointerCapture(event.pointerId);
  joint.classList.add("held");
  document.querySelector(`input[name=side][value=${SIDES[s]}]`).checked = true;
  const move = (event) => {
    if (!moved) keepForUndo();
    moved = true;
    const [x, y] = place(event);
    // From where the hand was when it was taken hold of: a drag there and back changes nothing.
    edit({ drags: [{ hand: SIDES[s], joint: j, x, y }] }, base);
  };
  const drop = () => {
    joint.classList.remove("held");
    joint.removeEventListener("pointermove", move);
  };
  joint.addEventListener("pointermove", move);
  joint.addEventListener("lostpointercapture", drop, { once: true });
}

function nudge(event, s, j) {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!by) return;
  event.preventDefault();
  if (editing) return;
  keepForUndo();
  const far = event.shiftKey ? 0.05 : 0.015;
  const [x, y] = state.hands.joints_2d[s][j];
  edit({ drags: [{ hand: SIDES[s], joint: j, x: x + far * by[0], y: y + far * by[1] }] });
}

function change(what) {
  if (!state.hands || editing) return;
  keepForUndo();
  edit(what).then(() => setHands(state.hands, false));
}

function undo() {
  if (!state.undo.length) return;
  setHands(state.undo.pop(), false);
}

// ---------------------------------------------------------------- what is seen

function show(image, waiting = false) {
  state.image = image;
  const picture = $("picture");
  if (image) picture.src = image;
  picture.alt = $("prompt").value;
  picture.classList.toggle("waiting", waiting);
  picture.hidden = !image || !$("showpicture").checked;
  $("save").hidden = !image || waiting;
  if (image) $("save").href = image;
  draw();
}

function busy(is) {
  $("stop").hidden = !is;
  $("curl").disabled = !state.request;
  $("canvas").setAttribute("aria-busy", is);
}

function say(sentence) {
  $("message").textContent = sentence;
  $("message").hidden = !sentence;
}

function setState(words) {
  $("state").textContent = words;
}

function remember(entry) {
  state.history.unshift(entry);
  if (state.history.length > 60) state.history.pop();
  state.current = 0;
  drawHistory();
}

function drawHistory() {
  $("past").hidden = !state.history.length;
  $("history").replaceChildren(
    ...state.history.map((entry, i) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      const image = document.createElement("img");
      const words = document.createElement("span");
      const prompt = document.createElement("b");
      button.type = "button";
      button.setAttribute("aria-current", i === state.current);
      image.src = entry.image;
      image.alt = entry.request.prompt;
      prompt.textContent = entry.request.prompt;
      words.append(prompt, `seed ${entry.request.seed}${entry.request.hands ? ", edited hands" : ""}`);
      button.append(image, words);
      button.addEventListener("click", () => recall(i));
      item.append(button);
      return item;
    }),
  );
}

function recall(i) {
  stop();
  const { image, hands, request } = state.history[i];
  state.current = i;
  state.request = request;
  $("prompt").value = request.prompt;
  $("seed").value = request.seed;
  for (const [id, name] of [["steps", "num_inference_steps"], ["guidance", "guidance_scale"], ["solver", "solver"]]) {
    if (request[name] !== undefined) $(id).value = request[name];
  }
  show(image);
  setHands(hands);
  setState(`seed ${request.seed}`);
  drawHistory();
  busy(false);
}

async function copyCurl() {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = $("key").value ? ` -H ${quoted("Authorization: Bearer $KEY")}` : "";
  const url = `${location.origin}/v1/images/generations`;
  const body = quoted(JSON.stringify(state.request));
  const line = `curl ${url} -H ${quoted("Content-Type: application/json")}${key} -d ${body}`;
  $("curl").dataset.line = line;
  try {
    await navigator.clipboard.writeText(line);
    setState("copied");
  } catch {
    say(line); // no clipboard here: it can be taken from the page
  }
}

// ---------------------------------------------------------------- beginning

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  paint(false);
});
$("again").addEventListener("click", () => paint(true));
$("hands").addEventListener("click", onlyHands);
$("stop").addEventListener("click", stop);
$("dice").addEventListener("click", () => ($("seed").value = Math.floor(Math.random() * 1e6)));
$("curl").addEventListener("click", copyCurl);
$("undo").addEventListener("click", undo);
$("drop").addEventListener("click", () => setHands(null));
$("mirror").addEventListener("click", () => change({ mirror: true }));
$("swap").addEventListener("click", () => change({ swap: true }));
$("gesture").addEventListener("change", (event) => {
  const hand = document.querySelector("input[name=side]:checked").value;
  if (event.target.value) change({ gesture: { hand, name: event.target.value } });
  event.target.value = "";
});
$("showbones").addEventListener("change", draw);
$("showpicture").addEventListener("change", () => show(state.image));
$("key").addEventListener("change", begin);
document.addEventListener("keydown", (event) => {
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && command) {
    event.preventDefault();
    paint(event.shiftKey);
  } else if (event.key === "Escape") {
    stop();
  } else if (event.key === "z" && command && !["TEXTAREA", "INPUT"].includes(document.activeElement.tagName)) {
    event.preventDefault();
    undo();
  }
});

async function begin() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    const { data: gestures } = await (await ask("/v1/gestures")).json();
    state.model = data[0];
    const { id, size, defaults, solvers, limits } = state.model;
    const [width, height] = size.split("x").map(Number);
    $("stage").style.setProperty("--ratio", width / height);
    $("model").textContent = `${id}, ${width} × ${height}`;
    $("steps").max = limits.steps;
    $("steps").value ||= defaults.steps;
    $("guidance").value ||= defaults.guidance;
    $("solver").replaceChildren(...solvers.map((name) => new Option(name, name, false, name === defaults.solver)));
    $("gesture").replaceChildren(
      new Option("Choose a gesture", ""),
      ...gestures.map((name) => new Option(name.replaceAll("_", " "), name)),
    );
    say("");
  } catch (error) {
    say(error.message);
  }
}
begin();
