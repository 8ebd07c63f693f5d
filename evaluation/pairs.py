"""Writes a blind preference study as one page that opens from disk: two pictures, random sides, two questions.

    text, number = page_of(Path("out-a"), Path("out-b"), count=50, seed=0, say=print)

The page first asks about plausibility for all pairs, without the prompt, and then about relevance with the prompt.
These are the two questions of the paper's user study (section 4.3). The page does not say which side is whose:
`preferences.py` derives it from the names of study and pair. Answers stay in the browser until the rater saves them.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path

import numpy as np

from ..data.dataset import Index
from ..data.samples import Bad, encode_png, picture
from ..errors import EvaluationError
from ..schema import MisfitError
from .pictures import Say

FORMAT = 1  # of the answers
QUESTIONS = {
    "plausibility": "In which picture do the hands look more like real hands?",
    "relevance": "Which picture fits the text better?",
}


def a_is_left(study: str, question: str, pair: str) -> bool:
    """Whether A is on the left: a fair coin that always gives the same result for the same names."""
    return hashlib.sha256(f"{study}/{question}/{pair}".encode()).digest()[0] % 2 == 0


def page_of(a: Path, b: Path, count: int, seed: int, say: Say) -> tuple[str, int]:
    """The page and its number of pairs. Raises EvaluationError for folders without a common picture."""
    indexes = [Index.open(folder) for folder in (a, b)]
    common = _common(*indexes)
    if not common:
        raise EvaluationError(
            f"A and B must have a picture in common by key or by prompt, got {a} and {b}. Name other folders."
        )
    names, found = sorted(common), list[tuple[str, list[np.ndarray]]]()
    for name in (names[i] for i in np.random.default_rng(seed).permutation(len(names))):
        if len(found) == count:
            break
        samples = [index.sample(i) for index, i in zip(indexes, common[name], strict=True)]
        bad = [sample for sample in samples if isinstance(sample, Bad)]
        try:
            if bad:
                raise MisfitError(bad[0].sentence)
            images = [picture(sample) for sample in samples]  # type: ignore[arg-type]
        except MisfitError as error:
            say(f"left out: {name}: {error}")
            continue
        found.append((samples[0].prompts[0], images))  # type: ignore[union-attr]
    if not found:
        raise EvaluationError(f"A and B must have a readable picture in common, got {a} and {b}. Name other folders.")
    content = [[prompt, *(hashlib.sha256(image.tobytes()).hexdigest() for image in images)] for prompt, images in found]
    study = hashlib.sha256(json.dumps([seed, content]).encode()).hexdigest()[:16]
    items = []
    for number, (prompt, images) in enumerate(found):
        pair = hashlib.sha256(f"{study}{number}".encode()).hexdigest()[:12]
        a_b = [_data(image) for image in images]
        sides = {q: a_b if a_is_left(study, q, pair) else a_b[::-1] for q in QUESTIONS}
        items.append({"pair": pair, "prompt": prompt, "sides": sides})
    data = {"study": study, "a": a.resolve().name, "b": b.resolve().name, "items": items, "questions": QUESTIONS}
    # "<" would let a prompt end the script.
    return _PAGE.replace("%DATA%", json.dumps(data).replace("<", "\\u003c")).replace(
        "%TITLE%", html.escape("Which of two pictures?")
    ), len(items)


def _common(first: Index, second: Index) -> dict[str, tuple[int, int]]:
    """Name -> the numbers of a picture in both folders. Names are keys, or prompts where no key is in both."""

    def by_key(index: Index) -> dict[str, int]:
        return {index.entry(i).key: i for i in np.flatnonzero(index.has_picture).tolist()}

    def by_prompt(index: Index) -> dict[str, int]:
        out: dict[str, int] = {}
        for i in np.flatnonzero(index.has_picture).tolist():
            sample = index.sample(i)
            if not isinstance(sample, Bad):
                out.setdefault(sample.prompts[0], i)
        return out

    for names in (by_key, by_prompt):
        ours, theirs = names(first), names(second)
        if found := {name: (ours[name], theirs[name]) for name in ours.keys() & theirs.keys()}:
            return found
    return {}


def _data(image: np.ndarray) -> str:
    """The picture as a data URL, encoded again: the metadata of its file would name its source."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>%TITLE%</title>
<style>
body { font: 17px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 1.5rem auto;
  padding: 0 1rem; text-align: center; }
#pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
#pair img { width: 100%; max-height: 62vh; object-fit: contain; border-radius: 4px; cursor: pointer; }
button { font: inherit; padding: .5rem 1.1rem; margin: .3rem; border: 1px solid #888; border-radius: 6px;
  background: #f4f4f4; cursor: pointer; }
button:focus-visible, img:focus-visible { outline: 3px solid #2f6690; }
input { font: inherit; padding: .4rem; } kbd { border: 1px solid #aaa; border-radius: 4px; padding: 0 .3rem; }
.note { color: #666; font-size: 14px; } h1 { font-size: 1.4rem; } #prompt { font-style: italic; min-height: 1.6rem; }
progress { width: 100%; }
</style>
<section id="start">
<h1>Which of two pictures?</h1>
<p>You see two pictures at a time and say which is better. First the page asks about the hands alone, then about the
text. No answer is wrong. Keys: <kbd>&larr;</kbd> left, <kbd>&rarr;</kbd> right, <kbd>&darr;</kbd> cannot tell,
<kbd>Backspace</kbd> back.</p>
<p><label>Your name or a pseudonym: <input id="rater" maxlength="80" autocomplete="off"></label>
<button id="go">Begin</button></p>
<p class="note">Answers stay in this browser until you save them as a file at the end. Nothing is sent anywhere.</p>
</section>
<section id="ask" hidden>
<progress id="done" value="0" max="1"></progress>
<h1 id="question"></h1>
<p id="prompt"></p>
<div id="pair"><img id="left" alt="left picture" tabindex="0"><img id="right" alt="right picture" tabindex="0"></div>
<p><button data-answer="left">&larr; left</button><button data-answer="same">&darr; cannot tell</button>
<button data-answer="right">right &rarr;</button></p>
<p class="note"><span id="count"></span> <button id="back">back</button> <button class="save">save the answers so far
</button></p>
</section>
<section id="end" hidden>
<h1>Thank you.</h1>
<p><button class="save">Save the answers</button></p>
<p class="note">Send the file to the person that asked you.</p>
</section>
<script>
"use strict";
const data = %DATA%;
const $ = id => document.getElementById(id);
let state = null, shown = 0;

function shuffled(values) {
  for (let i = values.length - 1; i > 0; i--) {
    const k = Math.floor(Math.random() * (i + 1));
    [values[i], values[k]] = [values[k], values[i]];
  }
  return values;
}
function begin() {
  const rater = $("rater").value.trim() || "anonymous";
  const slot = "hd-eval/" + data.study + "/" + rater;
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(slot)); } catch (error) { /* some browsers keep nothing for files */ }
  if (kept && kept.order && kept.order.length === Object.keys(data.questions).length * data.items.length) state = kept;
  else {
    const order = [];
    for (const question of Object.keys(data.questions))
      for (const number of shuffled([...data.items.keys()])) order.push([question, number]);
    state = {rater, slot, order, answers: []};
  }
  $("start").hidden = true;
  show();
}
function show() {
  const at = state.answers.length, all = state.order.length;
  $("ask").hidden = at >= all;
  $("end").hidden = at < all;
  if (at >= all) return;
  const [question, number] = state.order[at], item = data.items[number];
  $("question").textContent = data.questions[question];
  $("prompt").textContent = question === "relevance" ? item.prompt : "";
  [$("left").src, $("right").src] = item.sides[question];
  $("count").textContent = (at + 1) + " of " + all;
  $("done").max = all;
  $("done").value = at;
  shown = performance.now();
}
function answer(word) {
  if (!state || state.answers.length >= state.order.length) return;
  const [question, number] = state.order[state.answers.length];
  const seconds = Math.round((performance.now() - shown) / 100) / 10;
  state.answers.push({question, pair: data.items[number].pair, answer: word, seconds});
  keep();
  show();
}
function back() {
  if (state && state.answers.length) { state.answers.pop(); keep(); show(); }
}
function keep() {
  try { localStorage.setItem(state.slot, JSON.stringify(state)); } catch (error) { /* until it is closed */ }
}
function result() {
  return {hd_eval_answers: 1, study: data.study, a: data.a, b: data.b, pairs: data.items.length, rater: state.rater,
    answers: state.answers};
}
function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(result(), null, 1)], {type: "application/json"}));
  link.download = "answers-" + state.rater.replace(/[^A-Za-z0-9]+/g, "-") + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
$("go").onclick = begin;
$("rater").onkeydown = event => { if (event.key === "Enter") begin(); };
$("back").onclick = back;
for (const button of document.querySelectorAll(".save")) button.onclick = save;
for (const button of document.querySelectorAll("[data-answer]")) button.onclick = () => answer(button.dataset.answer);
$("left").onclick = () => answer("left");
$("right").onclick = () => answer("right");
document.addEventListener("keydown", event => {
  if (!state || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const word = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "same"}[event.key];
  if (word) { event.preventDefault(); answer(word); }
  if (event.key === "Backspace") { event.preventDefault(); back(); }
});
</script>
</html>
"""
