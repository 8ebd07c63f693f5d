// The size of pictures, where the model paints any.

import { $ } from "./server.js";

const LONG = 1.5; // times the short side of a portrait or a landscape

// model: of v1/models. before: what this tab chose before its reload.
export function offerSizes(model, before) {
  const { size, size_multiple: multiple, sizes, limits } = model; // sizes: of engines that paint these alone
  const [width, height] = size.split("x").map(Number);
  const short = Math.min(width, height);
  const long = Math.round((LONG * short) / (multiple || 1)) * (multiple || 1);
  const named = sizes
    ? sizes.map((one) => one.split("x").map(Number)).map(([w, h]) => [shapeOf(w, h), w, h])
    : [["Square", short, short], ["Portrait", short, long], ["Landscape", long, short]];
  const others = named.filter(([, w, h]) => `${w}x${h}` !== size && w * h <= limits.pixels);
  $("sizes").hidden = !multiple || (sizes && !others.length);
  $("size").replaceChildren(
    new Option(`Own, ${width} × ${height}`, ""),
    ...others.map(([name, w, h]) => new Option(`${name}, ${w} × ${h}`, `${w}x${h}`)),
    ...(sizes ? [] : [new Option("Custom", "custom")]),
  );
  for (const [id, own] of [["width", width], ["height", height]]) {
    Object.assign($(id), { min: multiple, max: limits.side - (limits.side % (multiple || 1)), step: multiple || 1 });
    $(id).value = before[id] || own;
  }
  if (multiple && [...$("size").options].some((option) => option.value === before.size)) $("size").value = before.size;
  opened();
}

const shapeOf = (width, height) => (width === height ? "Square" : width < height ? "Portrait" : "Landscape");

// "512x768", or "" for the model's own size.
export function chosenSize() {
  return $("size").value === "custom" ? `${$("width").value}x${$("height").value}` : $("size").value;
}

// A picture of the history has this size.
export function recallSize(size = "") {
  const has = (value) => [...$("size").options].some((option) => option.value === value);
  $("size").value = has(size) ? size : has("custom") ? "custom" : "";
  if ($("size").value === "custom") [$("width").value, $("height").value] = size.split("x");
  opened();
}

// Lets the browser say beside the field what is too large.
export function sizeIsValid(model) {
  const [width, height] = chosenSize().split("x").map(Number);
  const most = model?.limits.pixels;
  $("height").setCustomValidity(
    height && width * height > most ? `Width times height must be at most ${most.toLocaleString("en")} pixels.` : "",
  );
}

function opened() {
  const custom = $("size").value === "custom";
  $("sides").hidden = !custom;
  for (const id of ["width", "height"]) $(id).disabled = !custom; // a hidden field must not stop the form
}

$("size").addEventListener("change", opened);
$("sides").addEventListener("input", () => $("height").setCustomValidity(""));
