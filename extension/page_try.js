// Try it: a prompt with the original of a run and with its erasure at a strength, side by side.
import { call, make, root, set } from "./page_dom.js";

const DELTA = "delta.salun.safetensors";
const SHOWN = 6; // results
const parts = {}; // the form, once it is made
let chosenByHand = false; // whether the user has chosen the run or written the prompt

function field(label, control, help) {
  const id = `salun_try_${control.name}`;
  control.id = id;
  const text = make("label", { for: id }, label);
  if (!help) return make("div", { class: "salun-field" }, text, control);
  control.setAttribute("aria-describedby", `${id}_help`);
  return make("div", { class: "salun-field" }, text, make("small", { id: `${id}_help` }, help), control);
}

function build(soon) {
  parts.run = make("select", { name: "run", change: () => { chosenByHand = true; suggest(); } });
  parts.prompt = make("input", { name: "prompt", type: "text", maxlength: "2000", autocomplete: "off",
    input: () => { chosenByHand = true; } });
  parts.strength = make("input", { name: "strength", type: "range", min: "-0.5", max: "1.5", step: "0.05", value: "1",
    input: () => showStrength() });
  parts.value = make("output", { for: "salun_try_strength" }, "1");
  parts.seed = make("input", { name: "seed", type: "number", min: "0", step: "1", value: "0" });
  parts.message = make("div", { class: "salun-status", role: "status" });
  parts.error = make("div", { class: "salun-error", role: "alert" });
  parts.results = make("div", { class: "salun-tries" });
  parts.hint = make("p", { class: "salun-nothing" }, "The images of the original and of the erased model appear here, " +
    "side by side, from the same seed.");
  const strength = field("Strength", parts.strength, "0 is the original, 1 the erased model; −0.5 to 1.5");
  strength.querySelector("label").append(" ", parts.value);
  const submit = (event) => {
    event.preventDefault();
    start().then(soon);
  };
  return [make("form", { class: "salun-form", submit }, field("Run to try", parts.run), field("Prompt", parts.prompt),
    make("div", { class: "salun-two" }, strength, field("Seed", parts.seed)),
    make("button", { type: "submit", class: "salun-primary" }, "Try it"), parts.message, parts.error), parts.results];
}

function showStrength() {
  set(parts.value, String(Number(parts.strength.value)));
}

// A prompt of the run's own concept, unless the user wrote one.
function suggest() {
  const option = parts.run.selectedOptions[0];
  if (option && option.dataset.concept && (!parts.prompt.value || parts.prompt.value === parts.prompt.dataset.suggested)) {
    parts.prompt.value = option.dataset.concept;
    parts.prompt.dataset.suggested = option.dataset.concept;
  }
}

async function start() {
  set(parts.message, "");
  set(parts.error, "");
  if (!parts.run.value) return set(parts.error, "Choose a run first. A finished erasure is one.");
  if (!parts.prompt.value.trim()) return set(parts.error, "Enter a prompt first.");
  const body = { kind: "sample", run: parts.run.value, prompt: parts.prompt.value,
    strength: Number(parts.strength.value), seed: Math.trunc(Number(parts.seed.value)) };
  try {
    set(parts.message, `Queued: “${(await call("start", body)).title}”.`);
  } catch (error) {
    set(parts.error, error.message);
  }
}

// The form, wherever the page has its place, with the jobs' cards next to it, or below where there is no room.
export function fillTries(cards, soon) {
  const place = root().querySelector(".salun-try");
  if (!place) return;
  if (!place.querySelector("form")) {
    place.replaceChildren(...(parts.run ? [parts.form, parts.results] : build(soon)));
    parts.form = place.querySelector("form");
    listRuns();
  }
  const boxes = cards.length ? cards.slice(0, SHOWN) : [parts.hint];
  if (boxes.some((box, i) => parts.results.children[i] !== box) || parts.results.children.length !== boxes.length) {
    parts.results.replaceChildren(...boxes);
    if (cards.length) set(parts.message, "");
  }
}

// Bring the list of runs up to date; the latest one is chosen, unless the user chose another.
export async function listRuns() {
  if (!parts.run) return;
  const { runs } = await call("runs").catch(() => ({ runs: [] }));
  const usable = runs.filter((run) => run.status === "done" && run.files.includes(DELTA));
  const before = parts.run.value;
  const none = make("option", { value: "" }, usable.length ? "" : "no finished run yet");
  parts.run.replaceChildren(...(usable.length ? [] : [none]), ...usable.map((run) =>
    make("option", { value: run.run, "data-concept": (run.concept || [])[0] || "" }, run.run)));
  if (chosenByHand && usable.some((run) => run.run === before)) parts.run.value = before;
  suggest();
}

// Choose a run, and go to the form.
export async function tryRun(run) {
  await listRuns();
  parts.run.value = run;
  chosenByHand = true;
  suggest();
  parts.form.scrollIntoView({ behavior: "smooth", block: "center" });
  parts.prompt.focus({ preventScroll: true });
}
