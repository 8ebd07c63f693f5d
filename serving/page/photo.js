// The picture that a person repairs, and what the page says about it.

import { $, plain } from "./server.js";
import { GESTURES } from "./stage.js";

// hands: [{ hands, points, side, gesture, sureness }]; `points` says where the picture has the old hand.
export const photo = {
  file: null, url: null, first: null, width: 1, height: 1, hands: [], chosen: -1, strokes: [], undo: [],
  zoomed: false, running: null,
  preview: null, // what a repair looks like so far
};

export const chosen = () => photo.hands[photo.chosen];
export const words = (name) => GESTURES[name] ?? name.replaceAll("_", " ");
export const sideOf = (hands) => (hands.visibility[1] >= 0.5 ? 1 : 0);
export const places = (hand) => hand.hands.joints_2d[sideOf(hand.hands)];

export function said(sentence) {
  $("repairmessage").textContent = sentence;
  $("repairmessage").hidden = !sentence;
}

export function noted(sentences) {
  $("repairnotes").replaceChildren(
    ...sentences.map((sentence) => Object.assign(document.createElement("p"), { textContent: plain(sentence) })),
  );
  $("repairnotes").hidden = !sentences.length;
}

// Resolves to an Image, or fails with a sentence.
export function loaded(url) {
  return new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => failed(new Error("This file is not a picture that the browser can show. Take a PNG, JPEG or WebP file."));
    image.src = url;
  });
}

export function wrong(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) $("keybox").open = true;
  said(error.message);
}

export const tell = (sentence) => ($("repairstate").textContent = sentence);

// Pictures that a person pastes or drops anywhere. open: called with a file; refuse: with a sentence.
export function arriving(open, refuse) {
  const pictureOf = (items) => [...(items?.files ?? [])].find((file) => file.type.startsWith("image/"));
  document.addEventListener("paste", (event) => {
    const file = pictureOf(event.clipboardData);
    if (!file) return;
    event.preventDefault();
    open(file);
  });
  document.addEventListener("dragover", (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    const file = pictureOf(event.dataTransfer);
    if (file) return open(file);
    refuse("The file must be a PNG, JPEG or WebP picture. Drop another one.");
  });
}
