// The chart of a training's losses, on a logarithmic axis.
import { make } from "./page_dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 360, HEIGHT = 130, LEFT = 44, BOTTOM = 20, TOP = 6;
const LOSSES = [["salun-forget", 1, "forget loss"], ["salun-retain", 2, "retain loss"]];
const SMOOTHING = 0.85; // weight of the past in the bold lines

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function smooth(values) {
  let mean = null;
  return values.map((value) => (mean = mean === null ? value : SMOOTHING * mean + (1 - SMOOTHING) * value));
}

function ticks(low, high) {
  const powers = [];
  for (let power = Math.ceil(low); power <= high; power++) powers.push(power);
  return powers.length > 1 ? powers : [low, high];
}

// rows: [step, forget loss, retain loss]. Returns the chart and its legend; nothing for fewer than two steps.
export function chart(rows) {
  const logs = rows.flatMap((row) => [row[1], row[2]]).filter((value) => value > 0).map(Math.log10);
  if (rows.length < 2 || !logs.length) return [];
  const low = Math.min(...logs), high = Math.max(...logs, low + 0.1);
  const first = rows[0][0], last = rows[rows.length - 1][0];
  const x = (step) => LEFT + ((WIDTH - LEFT - 4) * (step - first)) / Math.max(1, last - first);
  const y = (log) => TOP + ((HEIGHT - TOP - BOTTOM) * (high - log)) / (high - low);
  const latest = rows[rows.length - 1];
  const said = `losses of steps ${first} to ${last}: forget ${latest[1].toPrecision(2)}, retain ${latest[2].toPrecision(2)}`;
  const svg = drawn("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": said });
  for (const tick of ticks(low, high)) {
    svg.append(drawn("line", { class: "salun-grid", x1: LEFT, x2: WIDTH - 4, y1: y(tick), y2: y(tick) }));
    svg.append(drawn("text", { x: LEFT - 4, y: y(tick) + 3, "text-anchor": "end" }, (10 ** tick).toPrecision(1)));
  }
  svg.append(drawn("text", { x: LEFT, y: HEIGHT - 6 }, `step ${first}`));
  svg.append(drawn("text", { x: WIDTH - 4, y: HEIGHT - 6, "text-anchor": "end" }, `${last}`));
  for (const [name, column] of LOSSES) {
    const known = rows.filter((row) => row[column] > 0);
    const line = (values) => known.map((row, i) => `${x(row[0]).toFixed(1)},${y(values[i]).toFixed(1)}`).join(" ");
    const values = known.map((row) => Math.log10(row[column]));
    svg.append(drawn("polyline", { class: `${name} salun-raw`, points: line(values) }));
    svg.append(drawn("polyline", { class: name, points: line(smooth(values)) }));
  }
  const legend = make("div", { class: "salun-legend" },
    ...LOSSES.map(([name, , title]) => make("span", {}, make("i", { class: name }), title)),
    make("span", {}, "bold: smoothed"));
  return [svg, legend];
}
