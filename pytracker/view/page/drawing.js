// Cards with charts in them: drawn when they come into view, zoomed together, saved as picture or table.
"use strict";

const cards = new Map(); // id of a chart -> its card
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const SETTINGS = { responsive: true, displayModeBar: false };
const UNITS = { step: "step", time: "training time in hours", epoch: "epoch" };
let zoom = null; // the steps (or hours, or epochs) that all charts show; null: all

function themed(layout, height) {
  const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"), exponentformat: "power" };
  const both = (given, extra = {}) => ({ ...axis, ...extra, ...given });
  return {
    ...layout,
    height,
    margin: { l: 60, r: 14, t: 8, b: 40, ...layout.margin },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: layout.plot_bgcolor || "rgba(0,0,0,0)",
    font: { color: style("--ink"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { align: "left", bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--ink") }, namelength: 40 },
    xaxis: both(layout.xaxis),
    yaxis: both(layout.yaxis),
  };
}

const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const card = cards.get(entry.target.dataset.chart);
      if (!card) continue;
      card.visible = entry.isIntersecting;
      if (card.visible && card.stale) card.refresh();
    }
  },
  { rootMargin: "300px" },
);

// A card with a title, buttons and an empty chart. `plot(card)` returns { data, layout, config } when it is to be drawn.
function makeCard(id, title, plot, { height = 300, kind = "line", wide = false } = {}) {
  const note = make("span", { className: "note" });
  const chart = make("div", { className: `chart ${kind}`, data: { chart: id } });
  chart.style.minHeight = `${height}px`;
  const tools = make("span", { className: "tools" });
  const head = make("div", { className: "head" }, make("h3", {}, title), note, tools);
  const element = make("section", { className: wide ? "card wide" : "card" }, head, chart);
  const card = { id, title, element, chart, note, tools, height, kind, stale: true, visible: false, log: null, whole: false };
  card.refresh = async () => {
    if (!card.visible) {
      card.stale = true;
      return;
    }
    card.stale = false;
    const drawn = plot(card);
    element.hidden = drawn === null;
    if (drawn === null) return;
    await Plotly.react(chart, drawn.data, themed(drawn.layout, drawn.height || card.height), SETTINGS);
    if (!card.wired) {
      card.wired = true;
      if (kind === "line") chart.on("plotly_relayout", (change) => follow(card, change));
      if (card.clicked) chart.on("plotly_click", card.clicked);
    }
  };
  tools.append(
    make("button", { className: "small", title: "save as a picture", onclick: () => savePicture(card) }, "PNG"),
    make("button", { className: "small", title: "save what is drawn as a table", onclick: () => saveTable(card) }, "CSV"),
  );
  cards.set(id, card);
  seen.observe(chart);
  return card;
}

function toggle(card, name, title, get, set) {
  const button = make("button", { className: `small ${name}`, title, "aria-pressed": "false" }, name);
  button.addEventListener("click", () => {
    set(!get());
    card.refresh();
  });
  card.tools.prepend(button);
  return () => button.setAttribute("aria-pressed", String(Boolean(get())));
}

function lineCard(chart) {
  const plot = (card) => {
    const unit = view.unit;
    const lines = linesOf(chart, shownRuns(), unit);
    if (!lines.length) return null;
    if (card.log === null) card.log = asksForLog(chart, lines);
    const range = card.log ? { clipped: false } : rangeOf(lines, card.whole);
    const traces = tracesOf(lines, view.smoothing, unit);
    const clip = chart.id === "grad_norm" ? clipShapes() : [];
    pressed.forEach((show) => show());
    const splits = new Set(chart.names.map((name) => pageNames[name].split));
    const notes = [];
    if (splits.size > 1) notes.push("thick, with rings: held out");
    if (chart.names.includes("grad_max")) notes.push("dotted: the largest of one parameter");
    card.note.textContent = notes.join("; ");
    const yaxis = card.log
      ? { type: "log", dtick: decades(lines) > 1.5 && decades(lines) < 8 ? 1 : undefined }
      : { type: "linear", range: [range.low, range.high] };
    if (range.constant !== undefined && range.constant !== 0) {
      const ticks = [0, range.constant, 2 * range.constant];
      Object.assign(yaxis, { tickvals: ticks, ticktext: ticks.map(short) });
    }
    const legend = traces.filter((trace) => trace.showlegend !== false).length;
    return {
      data: [...findingTraces(lines, unit), ...traces, ...markTraces(lines, range, unit)],
      height: card.height + (legend > 1 && legend <= LEGEND_LINES ? 20 * Math.ceil(legend / 4) : 0),
      layout: {
        hovermode: legend <= 24 ? "x unified" : "closest",
        showlegend: legend > 1 && legend <= LEGEND_LINES,
        legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11 } },
        xaxis: { title: { text: UNITS[unit], standoff: 4 }, range: zoom || wholeRange(unit) },
        yaxis,
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
        shapes: clip,
      },
    };
  };
  const card = makeCard(`chart-${chart.id}`, chart.title, plot);
  const pressed = [
    toggle(card, "all", "every value, also those far from the rest", () => card.whole, (value) => (card.whole = value)),
    toggle(card, "log", "logarithmic", () => card.log, (value) => (card.log = value)),
  ];
  return card;
}

function decades(lines) {
  const positive = lines.flatMap(({ line }) => Array.from(line.y).filter((value) => value > 0));
  const [low, high] = positive.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, 0]);
  return high > 0 ? Math.log10(high / low) : 0;
}

function clipShapes() {
  const clips = new Set(shownRuns().map((run) => run.curves.clip).filter((value) => Number.isFinite(value) && value > 0));
  return [...clips].slice(0, 5).map((value) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: "#888888", width: 1.5, dash: "dash" },
    label: { text: `clip ${short(value)}`, textposition: "end", yanchor: "bottom", font: { color: "#888888", size: 11 } },
  }));
}

// The same x for every chart: from the first to the last of all runs shown.
function wholeRange(unit) {
  let [low, high] = [Infinity, -Infinity];
  for (const run of shownRuns()) {
    for (const line of Object.values(run.curves.series)) {
      const ends = along(run.curves, [line.x[0], line.x[line.x.length - 1]], unit);
      if (ends) [low, high] = [Math.min(low, ends[0]), Math.max(high, ends[1])];
    }
  }
  if (!(high >= low)) return [0, 1];
  const room = high > low ? 0.01 * (high - low) : 1;
  return [low - room, high + room];
}

let following = false;
async function follow(source, change) {
  if (following) return;
  const range = change["xaxis.range"] || [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  if (change["xaxis.autorange"]) zoom = null;
  else if (range[0] !== undefined) zoom = range.map(Number);
  else return;
  await showRange(zoom);
}

async function showRange(range) {
  zoom = range;
  following = true;
  const update = { "xaxis.range": zoom || wholeRange(view.unit) };
  const drawn = [...cards.values()].filter((card) => card.kind === "line" && card.chart.data && !card.element.hidden);
  for (const card of cards.values()) card.stale = card.kind === "line" ? card.stale || !card.visible : card.stale;
  await Promise.all(drawn.filter((card) => card.visible).map((card) => Plotly.relayout(card.chart, update)));
  following = false;
}

function fileName(card, ending) {
  return `${card.title.replace(/[^A-Za-z0-9_-]+/g, "-")}.${ending}`;
}

async function savePicture(card) {
  const url = await Plotly.toImage(card.chart, { format: "png", width: 1200, height: 600, scale: 2, setBackground: () => style("--card") });
  make("a", { href: url, download: fileName(card, "png") }).click();
}

// One row a point: run, series, x, y; what is drawn, before smoothing.
function tableOf(card) {
  const rows = [["run", "series", UNITS[view.unit] || "x", "y"]];
  for (const trace of card.chart.data || []) {
    const meta = trace.meta || {};
    if (trace.type !== "scatter" || !meta.series || meta.smooth || meta.finding || trace.yaxis === "y2") continue;
    for (const [at, x] of Array.from(trace.x).entries()) {
      if (Number.isFinite(trace.y[at])) rows.push([meta.run, meta.series, x, trace.y[at]]);
    }
  }
  return rows.map((row) => row.map(cell).join(",")).join("\n");
}

function saveTable(card) {
  download(fileName(card, "csv"), tableOf(card), "text/csv");
}
