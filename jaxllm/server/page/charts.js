// Live charts of the engine's figures, one point a second, and the state of the server.

import { showModels } from "./models.js";

const POINTS = 120;
const percent = (x) => trim(100 * x) + " %", ms = (x) => trim(1000 * x) + " ms", count = (x) => trim(x);
const perSecond = (x) => trim(x) + " tok/s";

// Title, unit of what is drawn, and what to draw from two snapshots.
export const CHARTS = [
  ["Throughput", perSecond, (s, p) => rate(s, p, "generation_tokens_total")],
  ["Time to first token, median", ms, (s) => s.ttft_p50],
  ["Time between tokens, median", ms, (s) => s.itl_p50],
  ["Requests running", count, (s) => s.num_requests_running],
  ["Requests waiting", count, (s) => s.num_requests_waiting],
  ["KV cache in use", percent, (s) => s.kv_cache_usage_perc],
  ["Prefix cache hit rate", percent, (s) => s.prefix_cache_hit_rate],
  ["Drafts that were right", percent, (s) => s.spec_decode_acceptance_rate],
  ["Tokens per iteration with drafts", count, (s) => s.spec_decode_mean_acceptance_length],
  ["MFU, share of peak FLOP/s", percent, (s) => s.mfu],
  ["MBU, share of peak bytes/s", percent, (s) => s.mbu],
].map(([title, show, read]) => ({ title, show, read, points: [] }));

function trim(x) { return x >= 100 || x === 0 ? x.toFixed(0) : Number(x.toPrecision(2)).toString(); }

function rate(now, before, name) {
  return before && now.time > before.time ? (now[name] - before[name]) / (now.time - before.time) : 0;
}

// The smallest of 1, 2, 5, 10, 20, ... that covers `x`: axes end at numbers people can read.
function ceiling(x) {
  const power = 10 ** Math.floor(Math.log10(x));
  return power * [1, 2, 5, 10].find((step) => step * power >= x * 0.999);
}

function addChart(chart, place) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const title = document.createElement("span");
  chart.value = document.createElement("b");
  chart.canvas = document.createElement("canvas");
  chart.canvas.role = "img";
  title.textContent = chart.title;
  caption.append(title, chart.value);
  figure.append(caption, chart.canvas);
  place.append(figure);
}

function draw(chart) {
  const canvas = chart.canvas, box = canvas.getBoundingClientRect(), scale = devicePixelRatio || 1;
  if (!box.width) return;
  canvas.width = box.width * scale;
  canvas.height = box.height * scale;
  const g = canvas.getContext("2d"), style = getComputedStyle(document.body);
  g.scale(scale, scale);
  g.font = "10px system-ui, sans-serif";
  const top = ceiling(Math.max(...chart.points, 1e-9) || 1e-9), flat = Math.max(...chart.points) <= 0;
  const high = flat ? (chart.show === percent ? 1 : chart.show === ms ? 0.01 : 1) : top;
  const ticks = chart.show === count && high < 2 ? [0, high] : [0, high / 2, high], left = 6 + Math.max(...ticks.map((v) => g.measureText(chart.show(v)).width));
  const right = box.width - 2, bottom = box.height - 15, upper = 7;
  const x = (i) => left + (right - left) * (i + POINTS - chart.points.length) / (POINTS - 1);
  const y = (v) => bottom - (bottom - upper) * v / high;
  g.fillStyle = style.getPropertyValue("--soft");
  g.strokeStyle = style.getPropertyValue("--line");
  g.textBaseline = "middle";
  g.textAlign = "right";
  for (const v of ticks) {
    g.fillText(chart.show(v), left - 4, y(v));
    g.beginPath(); g.moveTo(left, y(v)); g.lineTo(right, y(v)); g.stroke();
  }
  g.textBaseline = "alphabetic";
  g.textAlign = "left"; g.fillText("2 min ago", left, box.height - 3);
  g.textAlign = "right"; g.fillText("now", right, box.height - 3);
  if (chart.points.length < 2) return;
  g.strokeStyle = g.fillStyle = style.getPropertyValue("--accent");
  g.lineWidth = 1.5;
  g.beginPath();
  chart.points.forEach((v, i) => g.lineTo(x(i), y(v)));
  g.stroke();
  g.lineTo(x(chart.points.length - 1), bottom); g.lineTo(x(0), bottom);
  g.globalAlpha = 0.12;
  g.fill();
}

let before = null;
async function update(place) {
  const answer = await fetch("stats");
  if (!answer.ok) throw new Error(answer.status);
  const now = await answer.json();
  if (now.pool) showModels(place, now.pool);
  for (const chart of CHARTS) {
    const value = chart.read(now, before);
    if (value === null || value === undefined) continue;
    if (!chart.canvas) addChart(chart, place);  // what the engine does not measure has no chart
    chart.points.push(value);
    if (chart.points.length > POINTS) chart.points.shift();
    chart.value.textContent = chart.show(value);
    chart.canvas.ariaLabel = `${chart.title}: ${chart.show(value)}`;
    draw(chart);
  }
  before = now;
}

// Polls while the page is seen; charts that nobody sees cost the server nothing.
export function watch(place, state, drawn) {
  let ticks = 0, busy = false;
  async function tick() {
    if (document.hidden || busy || (!drawn() && ticks++ % 5)) return;
    busy = true;
    try {
      if (drawn()) await update(place);
      const health = await fetch("health");
      show(state, health.ok ? "healthy" : (await health.json()).error.message, health.ok);
    } catch { show(state, "no answer from the server", false); }
    busy = false;
  }
  setInterval(tick, 1000);
  tick();
  return tick;
}

function show(state, text, good) {
  if (state.textContent !== text) state.textContent = text;
  state.className = good ? "" : "bad";
}
