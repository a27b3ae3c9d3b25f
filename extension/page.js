// The live part of the page: the state of the jobs, polled from the API every second. Texts are inserted as text nodes.
(() => {
  "use strict";
  if (window.salunLive) return;
  window.salunLive = true;

  const base = new URL("salun/v1/", document.baseURI.replace(/[^/]*([?#].*)?$/, ""));
  const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
  const panel = () => root().querySelector(".salun-live");
  const STATES = {
    queued: "queued", waiting: "waiting for the GPU", running: "running", stopping: "stopping",
    done: "done", failed: "failed", cancelled: "cancelled",
  };
  const ENDED = 8; // ended jobs that are shown, besides resumable ones
  const known = new Map(); // job id → its card
  const wasOpen = new Map(); // job id → whether it was open at the last poll, to detect its end
  let timer = null;
  let polling = false;

  function make(tag, attributes = {}, ...inside) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "click") made.addEventListener("click", value);
      else if (value !== null) made.setAttribute(name, value);
    }
    made.append(...inside.filter((part) => part !== null && part !== undefined));
    return made;
  }

  async function call(path, body, raw) {
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

  function duration(seconds) {
    if (seconds === null) return "";
    if (seconds < 10) return "a few seconds left";
    if (seconds < 90) return `about ${Math.ceil(seconds / 10) * 10} s left`;
    if (seconds < 5400) return `about ${Math.ceil(seconds / 60)} min left`;
    return `about ${(seconds / 3600).toFixed(1)} h left`;
  }

  function size(bytes) {
    return bytes < 1e9 ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
  }

  function plot(rows) {
    const SVG = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 320 110");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", "losses over the steps");
    const values = rows.flatMap((row) => [row[1], row[2]]).filter((v) => v > 0).map(Math.log10);
    if (rows.length < 2 || !values.length) return [];
    const low = Math.min(...values), high = Math.max(...values, low + 0.1);
    const first = rows[0][0], last = rows[rows.length - 1][0];
    [["salun-forget", 1], ["salun-retain", 2]].forEach(([kind, k]) => {
      const points = rows.filter((row) => row[k] > 0).map((row) => {
        const x = (320 * (row[0] - first)) / Math.max(1, last - first);
        return `${x.toFixed(1)},${(105 - (100 * (Math.log10(row[k]) - low)) / (high - low)).toFixed(1)}`;
      });
      const line = document.createElementNS(SVG, "polyline");
      line.setAttribute("class", kind);
      line.setAttribute("points", points.join(" "));
      svg.append(line);
    });
    const legend = make("div", { class: "salun-legend" },
      make("span", {}, make("i", { class: "salun-forget" }), "forget loss"),
      make("span", {}, make("i", { class: "salun-retain" }), "retain loss"),
      make("span", {}, `from ${(10 ** low).toPrecision(2)} to ${(10 ** high).toPrecision(2)}, logarithmic`));
    return [svg, legend];
  }

  async function act(path, id, message) {
    try {
      await call(path, { id });
      message.textContent = "";
    } catch (error) {
      message.textContent = error.message;
    }
    soon();
  }

  const missing = new Set(); // images that do not exist on the server

  async function image(target, path, otherwise = null) {
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

  function report(run) {
    return show(`file?run=${encodeURIComponent(run)}&name=report.html`, `report of ${run}`);
  }

  async function show(path, title) {
    const answer = await call(path, undefined, true);
    const frame = make("iframe", { sandbox: "", title });
    frame.srcdoc = await answer.text();
    const box = make("dialog", { class: "salun-report", "aria-label": "report" },
      make("button", { type: "button", click: () => box.close() }, "Close"), frame);
    box.addEventListener("close", () => box.remove());
    document.body.append(box);
    box.showModal();
  }

  function card(job) {
    const parts = {
      title: make("strong", {}, job.title),
      state: make("span", { class: "salun-state" }),
      stage: make("div", { class: "salun-stage", role: "status" }),
      bar: make("progress", { max: "1", value: "0", "aria-label": `progress of: ${job.title}` }),
      metrics: make("div", { class: "salun-metrics" }),
      plot: make("div", { class: "salun-plot" }),
      preview: make("img", { alt: "before and after, so far", hidden: "" }),
      notes: make("div", { class: "salun-notes" }),
      result: make("div", { class: "salun-result" }),
      status: make("div", { class: "salun-status", role: "status" }),
      error: make("div", { class: "salun-error", role: "alert" }),
      buttons: make("div", { class: "salun-buttons" }),
    };
    parts.box = make("section", { class: "salun-job", "data-job": job.id, "data-kind": job.kind },
      make("div", { class: "salun-head" }, parts.title, parts.state), parts.stage, parts.bar, parts.metrics,
      parts.plot, parts.preview, parts.notes, parts.result, parts.status, parts.error, parts.buttons);
    return parts;
  }

  function button(label, click) {
    return make("button", { type: "button", click }, label);
  }

  function fill(parts, job) {
    parts.box.dataset.state = job.state;
    parts.state.textContent = STATES[job.state] || job.state;
    fillProgress(parts, job);
    const name = job.previews[job.previews.length - 1];
    const latest = name ? `preview?id=${encodeURIComponent(job.id)}&name=${encodeURIComponent(name)}` : null;
    if (job.state === "done" && job.kind === "erase") {
      image(parts.preview, `file?run=${encodeURIComponent(job.run)}&name=before_after.png`, latest);
    } else {
      image(parts.preview, latest);
    }
    set(parts.notes, job.notes.slice(-3).join("\n"));
    if (job.error) set(parts.error, job.error);
    const key = `${job.state} ${job.resumable} ${job.kept_bytes} ${job.offers.join()}`;
    if (parts.buttons.dataset.key === key) return;
    parts.buttons.dataset.key = key;
    parts.result.replaceChildren(...results(job));
    parts.buttons.replaceChildren(...buttons(parts, job));
  }

  function fillProgress(parts, job) {
    const running = ["running", "stopping"].includes(job.state);
    const steps = job.total ? `, step ${job.step} of ${job.total}` : "";
    set(parts.stage, running ? job.stage_label + steps : "");
    parts.bar.hidden = !running;
    parts.bar.value = job.fraction;
    const percent = `${Math.floor(100 * job.fraction)} %`;
    const losses = job.losses.length ? job.losses[job.losses.length - 1] : null;
    const loss = losses ? `forget ${losses[1].toPrecision(3)}, retain ${losses[2].toPrecision(3)}` : "";
    set(parts.metrics, running ? [percent, duration(job.left), loss].filter(Boolean).join(" · ") : "");
    if (running && String(job.losses.length) !== parts.plot.dataset.n) {
      parts.plot.dataset.n = String(job.losses.length);
      parts.plot.replaceChildren(...plot(job.losses));
    }
    parts.plot.hidden = !running;
  }

  function buttons(parts, job) {
    const failed = (error) => set(parts.error, error.message);
    const openReport = () => report(job.run).catch(failed);
    const openEvaluation = () => show(`evaluation?id=${encodeURIComponent(job.id)}`, job.title).catch(failed);
    const answered = (promise) => promise.then((answer) => set(parts.status, answer.message || ""))
      .catch((error) => set(parts.error, error.message)).finally(soon);
    const exportAs = (form) => () => answered(call("start", { kind: "export", delta: job.run, form })
      .then((started) => ({ message: `Queued: “${started.title}”.` })));
    const choices = [
      [job.open && job.state !== "stopping", "Cancel", () => act("cancel", job.id, parts.error)],
      [job.resumable, "Resume", () => act("resume", job.id, parts.error)],
      [job.state === "done" && job.run, "Report", openReport],
      [job.offers.includes("evaluation"), "Report", openEvaluation],
      [job.offers.includes("use"), "Use this checkpoint", () => answered(call("use", { id: job.id }).finally(refreshLists))],
      [job.offers.includes("lora"), "Save as LoRA", exportAs("lora")],
      [job.offers.includes("diff"), "Save as full difference", exportAs("diff")],
      [job.offers.includes("delta"), "Save the delta", () => answered(save(job.run, "delta.salun.safetensors"))],
      [job.offers.includes("undo"), "Undo", () => answered(call("undo", { id: job.id }).finally(refreshLists))],
      [!job.open, "Remove", () => {
        const question = `“${job.title}” can be resumed. Removing it deletes its training state ` +
          `(${size(job.kept_bytes)}), so that it can no longer be resumed. Remove it?`;
        if (!job.resumable || window.confirm(question)) act("remove", job.id, parts.error);
      }],
    ];
    return choices.filter(([offered]) => offered).map(([, label, click]) => button(label, click));
  }

  function results(job) {
    const result = job.result;
    if (!result) return [];
    const lines = [];
    const number = (value) => (typeof value === "number" ? value.toFixed(1) : "?");
    const percent = (e) => `${number(e.value)} % (${number(e.low)}–${number(e.high)}, n = ${e.n})`;
    const metrics = result.metrics;
    if (metrics && metrics.ua) {
      lines.push(`forgotten (UA): ${percent(metrics.ua)}, before ${number(metrics.ua_before.value)} %`);
      if (metrics.ra_after) {
        lines.push(`retained (RA): ${percent(metrics.ra_after)}, before ${number(metrics.ra_before.value)} %`);
      }
    } else if (metrics) {
      lines.push(`unlearning accuracy (UA) unknown: ${metrics.reason}`);
    }
    (result.outputs || []).forEach((file) => lines.push(`${file.kind}: ${file.path}`));
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
    const parts = [make("ul", {}, ...lines.map((text) => make("li", {}, text)))];
    if (result.blocks) {
      parts.push(make("table", {}, ...Object.entries(result.blocks).map(([block, [selected, total]]) => {
        const fraction = total ? selected / total : 0;
        return make("tr", {}, make("th", { scope: "row" }, block),
          make("td", {}, make("meter", { min: "0", max: "1", value: String(fraction) })),
          make("td", {}, `${(100 * fraction).toFixed(1)} %`));
      })));
    }
    return parts;
  }

  function set(target, text) {
    if (target.textContent !== text) target.textContent = text;
  }

  async function save(run, name) {
    const answer = await call(`file?run=${encodeURIComponent(run)}&name=${encodeURIComponent(name)}`, undefined, true);
    const link = make("a", { href: URL.createObjectURL(await answer.blob()), download: `${run}.${name.replace("delta.", "")}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    return {};
  }

  let polled = false; // at least once
  let stale = false; // whether the lists of this page and of the host have to be refreshed

  function press(id) {
    const element = root().querySelector(`#${id}`);
    if (element) (element.tagName === "BUTTON" ? element : element.querySelector("button") || element).click();
  }

  function refreshLists() {
    stale = true;
    const open = [...root().querySelectorAll('[data-testid="dropdown-option"], [role="listbox"] [role="option"]')];
    if (open.some((option) => option.getClientRects().length)) return; // an open list is not changed
    stale = false;
    ["salun_refresh", "salun_host_checkpoints"].forEach(press);
  }

  function refreshLoras() {
    ["salun_host_loras_txt2img", "salun_host_loras_img2img"].forEach(press);
  }

  const nothing = make("p", {}, "No job yet. Jobs keep running if you close this page.");

  async function poll() {
    if (polling) return; // the poll in progress schedules the next
    polling = true;
    const live = panel();
    let wait = 1000;
    if (live) {
      try {
        const { jobs } = await call("status");
        let ended = false;
        let loras = false;
        for (const job of jobs) {
          const before = wasOpen.get(job.id); // undefined for a job that is newer than the last poll; it may have ended already
          const over = (before ?? polled) && !job.open;
          if (over) ended = true;
          if (job.kind === "export" && job.state === "done" && (over || !polled)) loras = true;
          wasOpen.set(job.id, job.open);
          if (!known.has(job.id)) known.set(job.id, card(job));
          fill(known.get(job.id), job);
        }
        if (loras) setTimeout(refreshLoras, polled ? 500 : 3000); // a new page first gets the host's own update
        polled = true;
        const past = jobs.filter((j) => !j.open);
        const others = new Set(past.filter((j) => !j.resumable).slice(ENDED));
        const order = [...jobs.filter((j) => j.open).reverse(), ...past.filter((j) => !others.has(j))];
        const boxes = order.map((job) => known.get(job.id).box);
        if (!boxes.length) boxes.push(nothing);
        if (boxes.some((box, i) => live.children[i] !== box) || live.children.length !== boxes.length) {
          live.replaceChildren(...boxes);
        }
        if (ended || stale) refreshLists();
        if (!jobs.some((job) => job.open)) wait = 2000;
      } catch (error) {
        const why = error.status ? error.message : `The program does not respond (${error.message}).`;
        live.replaceChildren(make("p", { class: "salun-error", role: "alert" }, why));
        wait = 3000;
      }
    }
    polling = false;
    clearTimeout(timer);
    timer = setTimeout(poll, wait);
  }

  function soon() {
    clearTimeout(timer);
    timer = setTimeout(poll, polling ? 300 : 50);
  }

  root().addEventListener("click", (event) => {
    const button = event.target.closest && event.target.closest("[data-salun-report]");
    if (button) report(button.dataset.salunReport).catch((error) => window.alert(error.message));
  });
  document.head.append(make("style", {}, `
    .salun-live { color: var(--body-text-color, inherit); }
    .salun-job { border: 1px solid var(--border-color-primary, #8888); border-radius: 8px; padding: 10px; margin: 0 0 10px; }
    .salun-head { display: flex; flex-wrap: wrap; gap: 8px; justify-content: space-between; overflow-wrap: anywhere; }
    .salun-state { opacity: .75; }
    .salun-job progress { width: 100%; height: 14px; accent-color: #2a78d6; }
    .salun-job img { max-width: 100%; border-radius: 4px; margin-top: 6px; }
    .salun-plot svg { width: 100%; max-width: 480px; background: #8881; }
    .salun-plot polyline { fill: none; stroke-width: 1.5; }
    .salun-forget { stroke: #d6452a; } .salun-retain { stroke: #2a78d6; }
    .salun-legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .9em; color: var(--body-text-color, inherit); }
    .salun-legend i { display: inline-block; width: 18px; border-top: 3px solid; margin-right: 5px; vertical-align: middle; }
    .salun-legend .salun-forget { border-top-color: #d6452a; } .salun-legend .salun-retain { border-top-color: #2a78d6; }
    .salun-notes { white-space: pre-line; opacity: .8; font-size: .9em; overflow-wrap: anywhere; }
    .salun-result li { overflow-wrap: anywhere; }
    .salun-error, .salun-bad { color: #c62828; overflow-wrap: anywhere; }
    .dark .salun-error, .dark .salun-bad { color: #ff8a80; }
    .salun-buttons { display: flex; flex-wrap: wrap; gap: 6px; margin-top: 6px; }
    .salun-live button, .salun-report button, [data-salun-report] { border: 1px solid var(--border-color-primary, #8888);
      border-radius: 6px; padding: 4px 12px; background: var(--button-secondary-background-fill, #8882); color: inherit; cursor: pointer; }
    .salun-live button:focus-visible, .salun-report button:focus-visible { outline: 2px solid #2a78d6; }
    .salun-report { width: min(1000px, 96vw); height: 92vh; padding: 8px; border-radius: 8px; }
    .salun-report iframe { width: 100%; height: calc(100% - 40px); border: 0; background: #fff; }
    .salun-table th, .salun-table td { text-align: left; padding: 2px 8px; vertical-align: top; }`));
  poll();
})();
