// Placing a hand: a person draws a box over the picture.

import { $ } from "./server.js";

export const isPlacing = () => $("scene").classList.contains("placing");

export function placing(on) {
  $("place").setAttribute("aria-pressed", on);
  $("scene").classList.toggle("placing", on);
}

// Follows the pointer. at: event -> [x, y] in [0, 1] of the picture. done: called with [left, top, right, bottom], or
// null if the pointer did not move.
export function drawBox(event, at, done) {
  if (event.button || !isPlacing()) return;
  event.preventDefault();
  const from = at(event);
  const rectangle = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  let box = null;
  rectangle.setAttribute("class", "placed");
  $("skeletons").append(rectangle);
  $("scene").setPointerCapture(event.pointerId);
  const move = (event) => {
    const to = at(event);
    box = [Math.min, Math.max].flatMap((pick) => [0, 1].map((axis) => pick(from[axis], to[axis])));
    const [x, y, width, height] = [box[0], box[1], box[2] - box[0], box[3] - box[1]];
    for (const [name, value] of Object.entries({ x, y, width, height })) rectangle.setAttribute(name, value);
  };
  const end = () => {
    $("scene").removeEventListener("pointermove", move);
    rectangle.remove();
    placing(false);
    done(box);
  };
  $("scene").addEventListener("pointermove", move);
  $("scene").addEventListener("lostpointercapture", end, { once: true });
}
