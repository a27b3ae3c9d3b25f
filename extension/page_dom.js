// What the parts of the page share: elements, calls of the API, numbers in words.

export const base = new URL("salun/v1/", document.baseURI.replace(/[^/]*([?#].*)?$/, ""));
export const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
export const panel = () => root().querySelector(".salun-live");

export function make(tag, attributes = {}, ...inside) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...inside.filter((part) => part !== null && part !== undefined));
  return made;
}

export function button(label, click) {
  return make("button", { type: "button", click }, label);
}

export function set(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// A call of the API. raw: return the response itself instead of its JSON.
export async function call(path, body, raw) {
  const live = panel();
  const headers = { "X-Salun-Token": live ? live.dataset.token : "" };
  const options = { headers };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  const response = await fetch(new URL(path, base), options);
  if (raw && response.ok) return response;
  const content = await response.json().catch(() => ({}));
  if (response.ok) return content;
  const failure = new Error(content.error || `the server responded with status ${response.status}`);
  failure.status = response.status; // set only if the server responded
  throw failure;
}

export function size(bytes) {
  return bytes < 1e9 ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
}

const missing = new Set(); // images that do not exist on the server

// Show an image of the API, or another one where that does not exist.
export async function image(target, path, otherwise = null) {
  if (missing.has(path)) path = otherwise;
  if (!path || missing.has(path) || target.dataset.path === path) return;
  target.dataset.path = path;
  try {
    const answer = await call(path, undefined, true);
    const old = target.src;
    target.src = URL.createObjectURL(await answer.blob());
    target.hidden = false;
    if (old) URL.revokeObjectURL(old);
  } catch (error) {
    target.dataset.path = "";
    if ([400, 404].includes(error.status)) missing.add(path);
  }
}

// A page of the API in a dialog, where it can run no script.
export async function show(path, title) {
  const answer = await call(path, undefined, true);
  const frame = make("iframe", { sandbox: "", title });
  frame.srcdoc = await answer.text();
  const box = make("dialog", { class: "salun-report", "aria-label": title }, button("Close", () => box.close()), frame);
  box.addEventListener("close", () => box.remove());
  document.body.append(box);
  box.showModal();
}

export function report(run) {
  return show(`file?run=${encodeURIComponent(run)}&name=report.html`, `report of ${run}`);
}
