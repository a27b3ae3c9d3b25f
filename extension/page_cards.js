// A job as a card: what came of it first, then progress, images, losses, and what can be done with it.
import { button, call, image, make, report, set, show, size } from "./page_dom.js";

const STATES = {
  queued: "queued", waiting: "waiting for the GPU", running: "running", stopping: "stopping",
  done: "done", failed: "failed", cancelled: "cancelled",
};
const DELTA = "delta.salun.safetensors";

export function card(job) {
  const parts = {
    title: make("strong", {}, job.title),
    state: make("span", { class: "salun-state", role: "status" }),
    toggle: button("Details", () => unfold(parts, parts.box.classList.contains("salun-folded"), true)),
    verdict: make("div", { class: "salun-verdict", hidden: "" }),
    stage: make("div", { class: "salun-stage" }),
    bar: make("progress", { max: "1", value: "0", "aria-label": `progress of: ${job.title}` }),
    metrics: make("div", { class: "salun-metrics" }),
    preview: make("img", { alt: "before and after, so far", hidden: "" }),
    pair: make("div", { class: "salun-pair", hidden: "" }),
    result: make("div", { class: "salun-result" }),
    plot: make("div", { class: "salun-plot", hidden: "" }),
    notes: make("div", { class: "salun-notes" }),
    status: make("div", { class: "salun-status", role: "status" }),
    error: make("div", { class: "salun-error", role: "alert" }),
    buttons: make("div", { class: "salun-buttons" }),
  };
  parts.box = make("section", { class: "salun-job", "data-job": job.id, "data-kind": job.kind, "aria-label": job.title },
    make("div", { class: "salun-head" }, parts.title, make("span", {}, parts.state, " ", parts.toggle)), parts.verdict, parts.stage, parts.bar,
    parts.metrics, parts.preview, parts.pair, parts.result, parts.plot, parts.notes, parts.status, parts.error,
    parts.buttons);
  parts.toggle.hidden = true;
  return parts;
}

// Show or hide the details of a job that ended. byHand: the user decided, and it stays so.
export function unfold(parts, open, byHand = false) {
  if (parts.byHand && !byHand) return;
  parts.byHand = byHand;
  parts.box.classList.toggle("salun-folded", !open);
  parts.toggle.setAttribute("aria-expanded", String(open));
}

// page: what the buttons call: soon(), refreshLists(), tryRun(run).
export function fill(parts, job, page) {
  parts.box.dataset.state = job.state;
  set(parts.state, STATES[job.state] || job.state);
  parts.toggle.hidden = job.open || job.kind === "sample";
  fillProgress(parts, job);
  fillImages(parts, job);
  fillLosses(parts, job);
  set(parts.notes, job.notes.slice(-3).join("\n"));
  if (job.error) set(parts.error, job.error);
  const key = `${job.state} ${job.resumable} ${job.kept_bytes} ${job.offers.join()}`;
  if (parts.buttons.dataset.key === key) return;
  parts.buttons.dataset.key = key;
  fillVerdict(parts, job.result && job.result.banner);
  parts.result.replaceChildren(...results(job));
  parts.buttons.replaceChildren(...buttons(parts, job, page));
}

function fillProgress(parts, job) {
  const running = ["running", "stopping"].includes(job.state);
  const steps = job.total ? `, step ${job.step} of ${job.total}` : "";
  set(parts.stage, running ? job.stage_label + steps : "");
  parts.bar.hidden = !running;
  parts.bar.value = job.fraction;
  const percent = `${Math.floor(100 * job.fraction)} %`;
  const left = job.time_left || "estimating the time left";
  const losses = job.losses.length ? job.losses[job.losses.length - 1] : null;
  const loss = losses ? `forget ${losses[1].toPrecision(3)}, retain ${losses[2].toPrecision(3)}` : "";
  set(parts.metrics, running ? [percent, left, loss].filter(Boolean).join(" · ") : "");
}

function preview(job, name) {
  return `preview?id=${encodeURIComponent(job.id)}&name=${encodeURIComponent(name)}`;
}

function fillImages(parts, job) {
  if (job.kind === "sample") {
    fillPair(parts, job);
    return;
  }
  const name = job.previews[job.previews.length - 1];
  const latest = name ? preview(job, name) : null;
  if (job.state === "done" && job.kind === "erase") {
    parts.preview.alt = "images of the same prompts and seeds, before and after the erasure";
    image(parts.preview, `file?run=${encodeURIComponent(job.run)}&name=before_after.png`, latest);
  } else {
    image(parts.preview, latest);
  }
}

// The original's image and the erased one, side by side.
function fillPair(parts, job) {
  if (job.state !== "done" || job.previews.length !== 2 || parts.pair.childElementCount) return;
  const captions = ["original", `strength ${job.result.strength}`];
  const pair = job.previews.map((name, i) => {
    const shown = make("img", { alt: `${captions[i]}: ${job.result.prompt}`, hidden: "" });
    image(shown, preview(job, name));
    return make("figure", {}, shown, make("figcaption", {}, captions[i]));
  });
  parts.pair.replaceChildren(...pair);
  parts.pair.hidden = false;
  if (!job.result.sensitive) return;
  parts.pair.classList.add("salun-veiled");
  const reveal = button("Show the images", () => {
    parts.pair.classList.remove("salun-veiled");
    reveal.remove();
  });
  parts.pair.append(reveal);
}

// The chart is the report's. That of a job that ended is asked for once.
function fillLosses(parts, job) {
  const shown = job.open ? String(job.step) : "ended";
  const training = job.losses.length > 1 || !job.open;
  if (job.kind !== "erase" || !training || parts.plot.dataset.shown === shown) return;
  parts.plot.dataset.shown = shown;
  call(`losses?id=${encodeURIComponent(job.id)}`, undefined, true).then((answer) => answer.text()).then((svg) => {
    parts.plot.innerHTML = svg; // of numbers alone
    parts.plot.hidden = !svg;
  }).catch(() => { parts.plot.dataset.shown = ""; });
}

function fillVerdict(parts, banner) {
  parts.verdict.hidden = !banner;
  if (!banner) return;
  parts.verdict.dataset.outcome = banner.outcome.split(" ")[0].toLowerCase();
  parts.verdict.replaceChildren(make("strong", {}, banner.outcome), make("p", {}, banner.text),
    ...(banner.next ? [make("p", { class: "salun-next" }, banner.next)] : []));
}

function results(job) {
  const result = job.result;
  if (!result) return [];
  const lines = [];
  const number = (value) => (typeof value === "number" ? value.toFixed(1) : "?");
  const percent = (e) => `${number(e.value)} % (${number(e.low)}–${number(e.high)}, n = ${e.n})`;
  const metrics = result.metrics;
  if (metrics && metrics.ua) {
    lines.push(`forgotten (UA), not corrected for the detector's errors: ${percent(metrics.ua)}, before ${number(metrics.ua_before.value)} %`);
    if (metrics.ra_after) {
      lines.push(`retained (RA): ${percent(metrics.ra_after)}, before ${number(metrics.ra_before.value)} %`);
    }
  } else if (metrics) {
    lines.push(`forgotten (UA) unknown: ${(metrics.reasons || {}).ua || metrics.reason || "not measured"}`);
  }
  if (result.output) lines.push(`written: ${result.output}`);
  (result.notes || []).forEach((note) => lines.push(note));
  if (typeof result.selected === "number") lines.push(`${result.selected} of ${result.total} weights selected`);
  if (result.kept) lines.push(`keeps ${(100 * result.kept.kept).toFixed(1)} % of the difference's energy`);
  if (typeof result.jaccard === "number") {
    lines.push(`overlap (Jaccard): ${result.jaccard.toFixed(3)}, by chance ${result.by_chance.toFixed(3)}`);
  }
  (Array.isArray(result.overlaps) ? result.overlaps : []).forEach((pair) => {
    if (pair.names) lines.push(`${pair.names.join(" and ")}: ${pair.entries} weights in both`);
  });
  return [...list(lines), ...layers(result), ...files(result)];
}

function list(lines) {
  return lines.length ? [make("ul", {}, ...lines.map((text) => make("li", {}, text)))] : [];
}

function files(result) {
  const lines = (result.outputs || []).map((file) => `${file.kind}: ${file.path}`);
  return lines.length ? [make("details", {}, make("summary", {}, "Files"), ...list(lines))] : [];
}

function layers(result) {
  if (!result.blocks) return [];
  return [make("table", { class: "salun-table" }, ...Object.entries(result.blocks).map(([block, [selected, total]]) => {
    const fraction = total ? selected / total : 0;
    const text = `${(100 * fraction).toFixed(1)} %`;
    return make("tr", {}, make("th", { scope: "row" }, block),
      make("td", {}, make("meter", { min: "0", max: "1", value: String(fraction), "aria-label": `${block}: ${text}` })),
      make("td", {}, text));
  }))];
}

function buttons(parts, job, page) {
  const failed = (error) => set(parts.error, error.message);
  const answered = (promise) => promise.then((answer) => set(parts.status, answer.message || ""))
    .catch(failed).finally(page.soon);
  const act = (path) => () => call(path, { id: job.id }).then(() => set(parts.error, "")).catch(failed).finally(page.soon);
  const exportAs = (form) => () => answered(call("start", { kind: "export", delta: job.run, form })
    .then((started) => ({ message: `Queued: “${started.title}”.` })));
  const openEvaluation = () => show(`evaluation?id=${encodeURIComponent(job.id)}`, job.title).catch(failed);
  const changed = (path) => () => answered(call(path, { id: job.id }).finally(page.refreshLists));
  const choices = [
    [job.open && job.state !== "stopping", "Cancel", act("cancel")],
    [job.resumable, "Resume", act("resume")],
    [job.offers.includes("sample"), "Try it", () => page.tryRun(job.run)],
    [job.state === "done" && job.kind === "erase", "Report", () => report(job.run).catch(failed)],
    [job.offers.includes("evaluation"), "Report", openEvaluation],
    [job.offers.includes("use"), "Use this checkpoint", changed("use")],
    [job.offers.includes("lora"), "Save as LoRA", exportAs("lora")],
    [job.offers.includes("diff"), "Save as full difference", exportAs("diff")],
    [job.offers.includes("delta"), "Save the delta", () => answered(save(job.run, DELTA))],
    [job.offers.includes("undo"), "Undo", changed("undo")],
    [!job.open, "Remove", () => {
      const question = `“${job.title}” can be resumed. Removing it deletes its training state ` +
        `(${size(job.kept_bytes)}), so that it can no longer be resumed. Remove it?`;
      if (!job.resumable || window.confirm(question)) act("remove")();
    }],
  ];
  return choices.filter(([offered]) => offered).map(([, label, click]) => button(label, click));
}

async function save(run, name) {
  const answer = await call(`file?run=${encodeURIComponent(run)}&name=${encodeURIComponent(name)}`, undefined, true);
  const link = make("a", { href: URL.createObjectURL(await answer.blob()), download: `${run}.${name.replace("delta.", "")}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  return {};
}
