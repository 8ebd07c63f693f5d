// The page: asks hd-serve for pictures and shows its answers. It loads nothing from other hosts.

import { dataset } from "./dataset.js";
import { offer } from "./repair.js";
import { $, ask, curlLine, picture } from "./server.js";
import { chosenSize, offerSizes, recallSize, sizeIsValid } from "./size.js";
import { GESTURES, announce, draw, failed, note, say, setHands, setState, show, state, toStage, undo } from "./stage.js";

const PREVIEWS = 9;
const NOTICE_MS = 4000; // without an answer from the server, after which the page says that it waits
const past = { entries: [], current: -1 };

// ---------------------------------------------------------------- painting

const drawn = () => Math.floor(Math.random() * 1e6);

// Returns whether the form is valid. If not, the browser shows the error beside the field.
function valid() {
  $("prompt").setCustomValidity($("prompt").value.trim() ? "" : "Say what the picture shows.");
  sizeIsValid(state.model);
  return $("form").reportValidity();
}

function wanted(hands, seed) {
  const body = { prompt: $("prompt").value.trim(), seed };
  if ($("negative").value.trim()) body.negative_prompt = $("negative").value.trim();
  if ($("steps").value) body.num_inference_steps = Number($("steps").value);
  if ($("guidance").value) body.guidance_scale = Number($("guidance").value);
  if ($("solver").value) body.solver = $("solver").value;
  if (chosenSize()) body.size = chosenSize();
  if (hands) body.hands = hands;
  return body;
}

// The stage has the shape of its picture.
function shape(size = state.model?.size) {
  const [width, height] = (size ?? "1x1").split("x").map(Number);
  $("stage").style.setProperty("--ratio", width / height);
}

// What the stage shows, so that it can come back if the next picture fails.
const scene = () => ({ image: state.image, request: state.request, hands: state.hands, undo: state.undo });

function restore({ image, request, hands, undo }) {
  state.request = request;
  shape(request?.size);
  show(image);
  setHands(hands);
  state.undo = undo;
  draw();
  if (request) showSeed();
}

function start(words) {
  stop();
  const controller = new AbortController();
  const run = { abort: () => controller.abort(), signal: controller.signal, before: scene(), started: performance.now() };
  state.running = run;
  busy(true);
  setState(words);
  $("picture").classList.add("old");
  $("progress").removeAttribute("value");
  run.waiting = setTimeout(() => setState("Waiting for the server. It may be busy with other pictures …"), NOTICE_MS);
  if (matchMedia("(pointer: coarse)").matches) document.activeElement?.blur(); // hides the telephone's keyboard
  toStage();
  return run;
}

// Returns whether the run is still the one that the page waits for.
function end(run) {
  clearTimeout(run.waiting);
  if (state.running !== run) return false;
  state.running = null;
  busy(false);
  return true;
}

// hands: those to paint, or null if the prompt decides.
async function paint(hands = null) {
  if (!valid()) return;
  // Edited hands keep the seed of their picture, so that the rest of it stays.
  const kept = hands && state.request ? state.request.seed : drawn();
  const seed = $("seed").value ? Number($("seed").value) : kept;
  const count = Number($("count").value);
  const bodies = Array.from({ length: count }, (_, i) => wanted(hands, seed + i));
  const run = start(hands ? "Painting these hands …" : "Making hands …");
  announce(count > 1 ? `Painting ${count} pictures.` : "Painting.");
  if (!hands) setHands(null);
  if (bodies[0].size !== run.before.request?.size) show(null);
  shape(bodies[0].size);
  Object.assign(run, { hands, seen: state.hands, count, done: 0, parts: Array(count).fill(0), notes: [] });
  const ends = await Promise.allSettled(bodies.map((body, i) => follow(body, i, run)));
  if (!end(run)) return; // the person stopped it, or started another one
  const wrong = ends.find((end) => end.status === "rejected")?.reason;
  if (ends[0].status === "rejected") restore(run.before);
  note(run.notes);
  $("progress").value = run.done / count;
  setState("");
  if (run.done) {
    const took = `${((performance.now() - run.started) / 1000).toFixed(1)} s`;
    setState(count > 1 ? `${run.done} of ${count} pictures, ${took}` : took);
    announce(count > 1 ? `${run.done} of ${count} pictures are done.` : "The picture is done.");
  }
  if (wrong) failed(wrong);
}

// Paints one of a run's pictures. The stage shows the first; the others go to the history.
async function follow(body, i, run) {
  const sent = { ...body, stream: true, partial_images: i ? 0 : PREVIEWS, return_hands: true };
  for await (const event of picture(sent, run.signal)) {
    clearTimeout(run.waiting);
    if (event.type === "image_generation.partial_image") {
      run.parts[i] = event.kind === "hands" ? 0.04 : event.step / event.steps;
      $("progress").value = run.parts.reduce((sum, part) => sum + part, 0) / run.count;
      if (event.kind === "hands") {
        if (!run.hands) setHands((run.seen = event.hands));
        setState("Painting …");
      } else {
        state.request = body;
        show(`data:image/png;base64,${event.b64_json}`, true);
        setState(`Step ${event.step} of ${event.steps}`);
      }
    } else if (event.type === "image_generation.completed") {
      const image = `data:image/png;base64,${event.b64_json}`;
      run.parts[i] = 1;
      run.done += 1;
      run.notes.push(...(event.warnings ?? []));
      const entry = { image, hands: event.hands, request: { ...body, seed: event.seed } };
      remember(entry, !i);
      if (!i) {
        state.request = entry.request;
        show(image);
        showSeed();
        if (state.hands === run.seen) setHands(event.hands, false); // else the person is editing them already
      }
      if (run.count > 1) setState(`${run.done} of ${run.count} pictures`);
    }
  }
}

async function onlyHands() {
  if (!valid()) return;
  const body = wanted(null, $("seed").value ? Number($("seed").value) : drawn());
  const run = start("Making hands …");
  try {
    const { prompt, seed } = body;
    const { data, warnings } = await (await ask("v1/hands", { prompt, seed }, run.signal)).json();
    if (!end(run)) return;
    state.request = body;
    show(null);
    shape();
    setHands(data[0].hands);
    showSeed();
    note(warnings ?? []);
    setState("Hands without a picture");
    announce("The hands are done.");
  } catch (error) {
    if (!end(run)) return;
    restore(run.before);
    setState("");
    failed(error);
  }
  $("progress").value = 0;
}

function stop() {
  const run = state.running;
  if (!run) return;
  end(run);
  run.abort();
  restore(run.before);
  $("progress").value = 0;
  setState("Stopped");
  announce("Stopped.");
}

function busy(is) {
  $("stop").hidden = !is;
  $("curl").disabled = is || !state.request;
  $("canvas").setAttribute("aria-busy", is);
  if (!is) return;
  say("");
  note([]);
  $("line").hidden = true;
  $("seedline").hidden = true;
  draw();
}

function showSeed() {
  $("seen").textContent = state.request.seed;
  $("reuse").disabled = $("seed").value === String(state.request.seed);
  $("seedline").hidden = false;
}

// ---------------------------------------------------------------- history

function remember(entry, onStage) {
  past.entries.unshift(entry);
  if (past.entries.length > 60) past.entries.pop();
  past.current = onStage ? 0 : past.current < 0 ? -1 : past.current + 1;
  drawHistory();
}

function drawHistory() {
  $("past").hidden = !past.entries.length;
  $("history").replaceChildren(
    ...past.entries.map((entry, i) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      const image = document.createElement("img");
      const words = document.createElement("span");
      const prompt = document.createElement("b");
      button.type = "button";
      button.setAttribute("aria-current", i === past.current);
      button.title = entry.request.prompt;
      image.src = entry.image;
      image.alt = "";
      prompt.textContent = entry.request.prompt;
      words.append(prompt, `seed ${entry.request.seed}${entry.request.hands ? ", edited hands" : ""}`);
      button.append(image, words);
      button.addEventListener("click", () => recall(entry));
      item.append(button);
      return item;
    }),
  );
}

function recall(entry) {
  stop();
  past.current = past.entries.indexOf(entry);
  state.request = entry.request;
  $("prompt").value = entry.request.prompt;
  $("negative").value = entry.request.negative_prompt ?? "";
  for (const [id, name] of [["steps", "num_inference_steps"], ["guidance", "guidance_scale"], ["solver", "solver"]]) {
    if (entry.request[name] !== undefined) $(id).value = entry.request[name];
  }
  recallSize(entry.request.size);
  shape(entry.request.size);
  show(entry.image);
  setHands(entry.hands);
  setState("From the history");
  say("");
  note([]);
  showSeed();
  settled();
  drawHistory();
  busy(false);
  toStage();
}

async function download() {
  $("zip").disabled = true;
  const link = document.createElement("a");
  try {
    link.href = URL.createObjectURL(await dataset(past.entries, state.model));
    link.download = "handiffuser.zip";
    link.click();
    announce("The pictures and their hands are in handiffuser.zip.");
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still write it
  } catch (error) {
    failed(error);
  }
  $("zip").disabled = false;
}

async function copyCurl() {
  try {
    $("line").value = curlLine(state.request);
    await navigator.clipboard.writeText($("line").value);
    setState("Copied");
    announce("Copied.");
  } catch (error) {
    if (error.status) return failed(error);
    $("line").hidden = false; // browsers deny the clipboard to pages without https
    $("line").select();
    setState("Copy the line below");
  }
}

// ---------------------------------------------------------------- what a reload keeps

const STORED = "handiffuser";
const KEPT = ["prompt", "negative", "seed", "count", "key"];
const OF_MODEL = ["steps", "guidance", "solver", "size", "width", "height"]; // known once the server has said what it paints with

// This tab's storage alone: it ends with the tab, and no other page of this address sees the key.
function store() {
  const values = stored();
  for (const id of KEPT) values[id] = $(id).value;
  if (state.model) for (const id of OF_MODEL) values[id] = $(id).value;
  values.model = state.model?.id ?? values.model;
  values.more = $("more").open;
  try {
    sessionStorage.setItem(STORED, JSON.stringify(values));
  } catch {
    // the browser forbids it: the page works without
  }
}

function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORED)) ?? {};
  } catch {
    return {};
  }
}

function settled() {
  $("dice").disabled = !$("seed").value;
  if (state.request) $("reuse").disabled = $("seed").value === String(state.request.seed);
  $("unguided").hidden = Number($("guidance").value || state.model?.defaults.guidance) > 1;
  store();
}

// ---------------------------------------------------------------- beginning

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  paint();
});
$("form").addEventListener("input", () => {
  $("prompt").setCustomValidity("");
  settled();
});
// The browser can show its message only beside a visible field.
$("more").addEventListener("invalid", () => ($("more").open = true), true);
$("more").addEventListener("toggle", store);
$("again").addEventListener("click", () => paint(state.hands));
$("hands").addEventListener("click", onlyHands);
$("stop").addEventListener("click", stop);
$("dice").addEventListener("click", () => {
  $("seed").value = "";
  settled();
  $("seed").focus(); // the button is disabled now and would lose the focus
});
$("reuse").addEventListener("click", () => {
  $("seed").value = state.request.seed;
  settled();
  announce("The next picture has this seed.");
});
for (const button of document.querySelectorAll("[data-prompt]")) {
  button.title = button.dataset.prompt;
  button.addEventListener("click", () => {
    $("prompt").value = button.dataset.prompt;
    settled();
    paint();
  });
}
$("curl").addEventListener("click", copyCurl);
$("zip").addEventListener("click", download);
$("key").addEventListener("change", () => {
  store();
  begin();
});
document.addEventListener("keydown", (event) => {
  if ($("painting").hidden) return;
  const command = event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && command) {
    event.preventDefault();
    paint(event.shiftKey ? state.hands : null);
  } else if (event.key === "Escape") {
    stop();
  } else if (event.key === "z" && command && !["TEXTAREA", "INPUT"].includes(document.activeElement.tagName)) {
    event.preventDefault();
    undo();
  }
});

function describe(model, gestures, before) {
  const { id, size, defaults, solvers, limits } = model;
  const [width, height] = size.split("x").map(Number);
  shape();
  $("model").textContent = `${id}, ${width} × ${height}`;
  $("steps").max = limits.steps;
  $("count").max = limits.n;
  $("solver").replaceChildren(...solvers.map((name) => new Option(name, name, false, name === defaults.solver)));
  $("gesture").replaceChildren(
    new Option("Choose a gesture", ""),
    ...gestures.map((name) => new Option(GESTURES[name] ?? name.replaceAll("_", " "), name)),
  );
  offer(gestures);
  const same = before.model === id; // another model has other defaults
  $("steps").value = (same && before.steps) || defaults.steps;
  $("guidance").value = (same && before.guidance) || defaults.guidance;
  if (same && solvers.includes(before.solver)) $("solver").value = before.solver;
  offerSizes(model, same ? before : {});
}

async function begin() {
  const before = stored();
  try {
    const { data: models } = await (await ask("v1/models")).json();
    const { data: gestures } = await (await ask("v1/gestures")).json();
    state.model = models[0];
    describe(state.model, gestures, before);
    settled();
    say("");
    note([]);
  } catch (error) {
    // A missing key is a note, not an error.
    if (error.status !== 401 || $("key").value.trim()) return failed(error);
    $("keybox").open = true;
    note([error.message]);
  }
}

const before = stored();
for (const id of KEPT) if (before[id]) $(id).value = before[id];
$("more").open = Boolean(before.more);
begin();
