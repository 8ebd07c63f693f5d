// Asks hd-serve, and turns errors into sentences for the person at the page.

export const $ = (id) => document.getElementById(id);

const GONE = "The server does not answer. Check that it runs and that you are online, then try again.";
// The API's names of fields -> the page's names.
const FIELDS = {
  num_inference_steps: "steps", guidance_scale: "guidance", negative_prompt: "negative prompt",
  guidance_interval: "guidance interval",
};
const PATH = "v1/images/generations";
const JSON_BODY = { "Content-Type": "application/json" };

// A sentence of the server with the page's names of fields.
export function plain(sentence) {
  return Object.entries(FIELDS).reduce((text, [name, words]) => text.replaceAll(name, words), sentence);
}

export class Trouble extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status;
  }
}

function headers() {
  const key = $("key").value.trim();
  if (/[^\x20-\x7e]/.test(key)) throw new Trouble("The API key must have letters, digits and signs only, got another character. Copy it again.", 401);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function seconds(answer) {
  const after = Math.ceil(Number(answer.headers.get("Retry-After")));
  if (!(after > 0)) return "in a moment";
  return after < 90 ? `in about ${after} second${after > 1 ? "s" : ""}` : `in about ${Math.round(after / 60)} minutes`;
}

// error: the server's { message, ... }, or null if a proxy answered.
function sentence(answer, error) {
  switch (answer.status) {
    case 401:
      return $("key").value.trim()
        ? "The server does not accept this API key. Check the key, then try again."
        : "This server asks for an API key. Type yours under “API key”.";
    case 429:
      return `The server is busy and its queue is full. Try again ${seconds(answer)}; your prompt and settings stay here.`;
    case 503:
      return `The server is not ready: it is starting or stopping. Try again ${seconds(answer)}.`;
    case 504:
      return "The server ran out of time for this picture. Ask for fewer steps, or try again when it is less busy.";
  }
  if (error?.message) return plain(error.message);
  return answer.status < 500
    ? `The server refused this (${answer.status}). Load the page again, then try once more.`
    : `The server cannot be reached behind its proxy (${answer.status}). Try again in a moment.`;
}

// body: an object, or a FormData with pictures. Raises Trouble with a sentence; AbortError passes through.
export async function ask(path, body, signal) {
  const form = body instanceof FormData; // the browser itself says how a form is written
  const given = { ...(form ? {} : JSON_BODY), ...headers() };
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: given,
      body: body === undefined || form ? body : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble(GONE);
  }
  if (answer.ok) return answer;
  let error = null;
  try {
    ({ error } = await answer.json());
  } catch {
    // not JSON: a proxy answered
  }
  throw new Trouble(sentence(answer, error), answer.status);
}

// One picture, as server-sent events: partial pictures, then the picture. body: an object, or a FormData for another
// path. Raises Trouble if it fails.
export async function* picture(body, signal, path = PATH) {
  const answer = await ask(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble(GONE);
    }
    if (chunk.done) throw new Trouble("The server stopped before the picture was done. Try again.");
    text += chunk.value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      if (!data.length) continue;
      const event = JSON.parse(data.map((line) => line.slice(6)).join("\n"));
      if (event.error) throw new Trouble(plain(event.error.message));
      yield event;
      if (event.type.endsWith(".completed")) return;
    }
  }
}

// A line for bash that sends `body`. Single quotes keep every character but themselves.
export function curlLine(body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const given = Object.entries({ ...JSON_BODY, ...headers() }).map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`);
  const url = new URL(PATH, document.baseURI).href;
  return ["curl", quoted(url), ...given, "--data-raw", quoted(JSON.stringify(body))].join(" ");
}
