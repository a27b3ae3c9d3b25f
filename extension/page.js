// The live part of the page: the state of the jobs, polled from the API every second. Texts are inserted as text nodes.
import { call, make, panel, report, root } from "./page_dom.js";
import { card, fill, unfold } from "./page_cards.js";
import { fillTries, listRuns, tryRun } from "./page_try.js";

const ENDED = 8; // ended jobs that are shown, besides resumable ones
const WRITING = ["export", "stack", "undo"]; // jobs with nothing to look at
const known = new Map(); // job id → its card
const wasOpen = new Map(); // job id → whether it was open at the last poll, to detect its end
let timer = null;
let polling = false;
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
  listRuns();
}

function refreshLoras() {
  ["salun_host_loras_txt2img", "salun_host_loras_img2img"].forEach(press);
}

const nothing = make("div", { class: "salun-nothing" },
  make("p", {}, make("strong", {}, "No job yet")),
  make("ol", {},
    make("li", {}, "Choose a checkpoint and what it should forget."),
    make("li", {}, "Press “Erase concept”. The job appears here, with its progress and images."),
    make("li", {}, "Read the verdict, then try your own prompts under “Try it”, before and after.")),
  make("p", {}, "Jobs keep running if you close this page. The original checkpoint is never changed."));

const page = { soon, refreshLists, tryRun };

function follow(jobs) {
  let ended = false;
  let loras = false;
  for (const job of jobs) {
    const before = wasOpen.get(job.id); // undefined for a job that is newer than the last poll; it may have ended already
    const over = (before ?? polled) && !job.open;
    if (over && job.kind !== "sample") ended = true;
    if (job.kind === "export" && job.state === "done" && (over || !polled)) loras = true;
    wasOpen.set(job.id, job.open);
    if (!known.has(job.id)) known.set(job.id, card(job));
    fill(known.get(job.id), job, page);
  }
  if (loras) setTimeout(refreshLoras, polled ? 500 : 3000); // a new page first gets the host's own update
  polled = true;
  if (ended || stale) refreshLists();
}

function arrange(live, jobs) {
  const past = jobs.filter((j) => !j.open);
  const others = new Set(past.filter((j) => !j.resumable).slice(ENDED));
  const order = [...jobs.filter((j) => j.open).reverse(), ...past.filter((j) => !others.has(j))];
  const latest = past.find((job) => !WRITING.includes(job.kind));
  order.forEach((job) => unfold(known.get(job.id), job.open || job === latest));
  const boxes = order.map((job) => known.get(job.id).box);
  if (!boxes.length) boxes.push(nothing);
  if (boxes.some((box, i) => live.children[i] !== box) || live.children.length !== boxes.length) {
    live.replaceChildren(...boxes);
  }
}

async function poll() {
  if (polling) return; // the poll in progress schedules the next
  polling = true;
  const live = panel();
  let wait = 1000;
  if (live) {
    try {
      const { jobs } = await call("status");
      follow(jobs);
      arrange(live, jobs.filter((job) => job.kind !== "sample"));
      fillTries(jobs.filter((job) => job.kind === "sample").map((job) => known.get(job.id).box), soon);
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
  const pressed = event.target.closest && event.target.closest("[data-salun-report]");
  if (pressed) report(pressed.dataset.salunReport).catch((error) => window.alert(error.message));
});
poll();
