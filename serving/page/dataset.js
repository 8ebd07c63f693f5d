// The history as a dataset: a zip with ID.png, ID.hands.npz and ID.json of each picture, as hd-run writes them.

// The API's names of settings -> those of ID.json.
const SETTINGS = { num_inference_steps: "steps", guidance_scale: "guidance" };
const text = (words) => new TextEncoder().encode(words);

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc32(content) {
  let crc = 0xffffffff;
  for (const byte of content) crc = (crc >>> 8) ^ CRC[(crc ^ byte) & 255];
  return (crc ^ 0xffffffff) >>> 0;
}

// Little-endian numbers of 2 or 4 bytes: fields([4, 0x04034b50], [2, 20]).
function fields(...numbers) {
  const bytes = new DataView(new ArrayBuffer(numbers.reduce((sum, [size]) => sum + size, 0)));
  let at = 0;
  for (const [size, value] of numbers) {
    size === 2 ? bytes.setUint16(at, value, true) : bytes.setUint32(at, value, true);
    at += size;
  }
  return new Uint8Array(bytes.buffer);
}

// A zip that stores its files as they are: pictures are compressed already. files: [name, Uint8Array] each.
export function zip(files, kind = "application/zip") {
  const parts = [];
  const directory = [];
  let at = 0;
  let length = 0;
  const put = (part) => {
    parts.push(part);
    at += part.length;
  };
  for (const [name, content] of files) {
    const title = text(name);
    const size = content.length;
    // needs version 2.0; UTF-8 names; stored; 1 January 1980
    const common = [[2, 20], [2, 0x0800], [2, 0], [2, 0], [2, 0x21], [4, crc32(content)], [4, size], [4, size], [2, title.length], [2, 0]];
    directory.push(fields([4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, at]), title);
    put(fields([4, 0x04034b50], ...common));
    put(title);
    put(content);
  }
  const start = at;
  for (const part of directory) length += part.length;
  parts.push(...directory);
  parts.push(fields([4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, length], [4, start], [2, 0]));
  return new Blob(parts, { type: kind });
}

// Nested lists of numbers -> a file of numpy's, float32.
export function npy(values) {
  const shape = [];
  for (let part = values; Array.isArray(part); part = part[0]) shape.push(part.length);
  const tuple = shape.length === 1 ? `(${shape[0]},)` : `(${shape.join(", ")})`;
  const header = `{'descr': '<f4', 'fortran_order': False, 'shape': ${tuple}, }`;
  const padded = header.padEnd(Math.ceil((10 + header.length + 1) / 64) * 64 - 11) + "\n";
  const numbers = new DataView(new ArrayBuffer(4 * values.flat(Infinity).length));
  values.flat(Infinity).forEach((value, i) => numbers.setFloat32(4 * i, value, true));
  const content = [text("?NUMPY"), fields([2, 1], [2, padded.length]), text(padded), new Uint8Array(numbers.buffer)];
  const file = new Uint8Array(content.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of content) {
    file.set(part, at);
    at += part.length;
  }
  file[0] = 0x93; // not a character
  return file;
}

// `<words of the prompt>-<seed>`, and a number where another picture has that name.
function named(request, taken) {
  const words = request.prompt.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40).replace(/^-+|-+$/g, "");
  const first = `${words || "picture"}-${request.seed}`;
  let name = first;
  for (let i = 2; taken.has(name); i++) name = `${first}-${i}`;
  taken.add(name);
  return name;
}

// entries: { image (a data URL), hands, request } each, the newest first. model: as /v1/models says.
export async function dataset(entries, model) {
  const files = [];
  const taken = new Set();
  for (const { image, hands, request } of entries.toReversed()) {
    const name = named(request, taken);
    const { hands: given, ...asked } = request;
    const settings = Object.entries(asked).map(([key, value]) => [SETTINGS[key] ?? key, value]);
    const [width, height] = (request.size ?? model.size).split("x").map(Number);
    const record = { ...model.defaults, ...Object.fromEntries(settings), id: name, width, height, edited_hands: Boolean(given), model: model.id };
    const bytes = Uint8Array.from(atob(image.slice(image.indexOf(",") + 1)), (one) => one.charCodeAt(0));
    const people = Array.isArray(hands); // with several, each array has an axis of people in front
    const names = Object.keys(people ? hands[0] : hands);
    const arrays = names.map((array) => [`${array}.npy`, npy(people ? hands.map((one) => one[array]) : hands[array])]);
    files.push([`${name}.png`, bytes]);
    files.push([`${name}.hands.npz`, new Uint8Array(await zip(arrays).arrayBuffer())]);
    files.push([`${name}.json`, text(JSON.stringify(record, null, 1) + "\n")]);
  }
  return zip(files);
}
