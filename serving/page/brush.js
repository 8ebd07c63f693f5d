// The brush: what a person paints over a picture, as strokes in [0, 1] of its sides, and as a mask for the server.

import { $ } from "./server.js";

const MAX_SIDE = 2048; // pixels of the canvas's longer side

export function resize(width, height) {
  const share = Math.min(1, MAX_SIDE / Math.max(width, height));
  $("brushed").width = Math.max(1, Math.round(width * share));
  $("brushed").height = Math.max(1, Math.round(height * share));
}

export function paint(strokes) {
  const canvas = $("brushed");
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = "#ff2d6f";
  for (const { size, points } of strokes) {
    pen.lineWidth = size * Math.max(canvas.width, canvas.height);
    pen.beginPath();
    points.forEach(([x, y], i) => pen[i ? "lineTo" : "moveTo"](x * canvas.width, y * canvas.height));
    if (points.length === 1) pen.lineTo(points[0][0] * canvas.width + 0.01, points[0][1] * canvas.height);
    pen.stroke();
  }
}

// Follows the pointer. stroke: { size, points }, to which the places are added. place: event -> [x, y].
export function follow(event, stroke, place, strokes, done) {
  const canvas = $("brushed");
  const move = (event) => {
    stroke.points.push(place(event));
    paint(strokes);
  };
  const end = () => {
    canvas.removeEventListener("pointermove", move);
    done();
  };
  canvas.setPointerCapture(event.pointerId);
  canvas.addEventListener("pointermove", move);
  canvas.addEventListener("lostpointercapture", end, { once: true });
  paint(strokes);
}

// A PNG as large as the picture: white where the person brushed, black elsewhere.
export function mask(width, height) {
  const whole = document.createElement("canvas");
  [whole.width, whole.height] = [width, height];
  const pen = whole.getContext("2d");
  pen.drawImage($("brushed"), 0, 0, width, height);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.globalCompositeOperation = "destination-over";
  pen.fillStyle = "#000";
  pen.fillRect(0, 0, width, height);
  return new Promise((done) => whole.toBlob(done, "image/png"));
}
