// Ties the page together: what is shown, the controls, and where the data come from: frozen in, or a server.
"use strict";

const POLL = 2000; // ms between two questions to the server; more where its answers take long
const NEWEST = 10; // runs that a live page draws at first

let pageNames = {};
const pageRuns = new Map(); // id -> a row of the table, with its curves once they are loaded
const view = { unit: "step", smoothing: 4, search: "", shown: new Set() };
const frozen = document.getElementById("frozen");

// The runs whose curves are drawn (or, with `loaded` false, that are chosen), in the order of their colours.
function shownRuns(loaded = true) {
  return [...pageRuns.values()].filter((run) => view.shown.has(run.id) && searched(run) && (run.curves || !loaded));
}

function unpacked(curves) {
  const pair = (spec) => spec && { ...spec, x: unpack(spec.x), y: unpack(spec.y) };
  const series = {};
  for (const [name, line] of Object.entries(curves.series)) {
    series[name] = { ...pair(line), means: pair(line.means), bad: line.bad && { ...line.bad, x: unpack(line.bad.x) } };
  }
  const clock = pair(curves.clock);
  clock.y = clock.y.map((seconds) => seconds / 3600);
  const maps = curves.parameters && { ...curves.parameters, edges: unpack(curves.parameters.edges) };
  for (const part of maps ? ["tables", "bands"] : []) {
    maps[part] = Object.fromEntries(Object.entries(maps[part]).map(([name, spec]) => [name, unpack(spec)]));
  }
  return { ...curves, series, clock: clock.x.length ? clock : null, epochs: pair(curves.epochs), parameters: maps };
}

function takeRows(rows, names) {
  pageNames = { ...pageNames, ...names };
  for (const row of rows) {
    const known = pageRuns.get(row.id);
    pageRuns.set(row.id, { ...row, look: known ? known.look : look(pageRuns.size), curves: known ? known.curves : null });
  }
}

function switchRun(id) {
  view.shown.delete(id) || view.shown.add(id);
  if (live && view.shown.has(id)) live.load(pageRuns.get(id));
  refreshAll();
}

let layoutKey = "";

// Cards for the charts that are there now; those that stay keep their place, zoom and scale.
function buildCharts() {
  const charts = chartsOf(pageNames).filter((chart) => shownRuns().some((run) => chart.names.some((name) => moves(run, name))));
  const key = JSON.stringify(charts.map((chart) => [chart.id, chart.names]));
  if (key === layoutKey) return;
  layoutKey = key;
  const groups = new Map();
  for (const chart of charts) groups.set(chart.group, [...(groups.get(chart.group) || []), chart]);
  for (const [id, card] of cards) {
    if (card.kind !== "line") continue;
    seen.unobserve(card.chart);
    Plotly.purge(card.chart);
    cards.delete(id);
  }
  const sections = [...groups].map(([name, members], index) =>
    make("details", { open: index < 8, className: "group" }, make("summary", {}, make("h2", {}, name), make("span", { className: "note" }, ` ${members.length}`)),
      make("div", { className: "grid" }, ...members.map((chart) => lineCard(chart).element))));
  document.getElementById("charts").replaceChildren(...sections, ...parallelSection());
}

// Whether a series is more than zeros, as the count of elements that are not finite is in a sound training.
const moves = (run, name) => {
  const line = run.curves.series[name];
  return line && (!/(^|\/)grad_\w+$/.test(name) || line.bad || line.low !== 0 || line.high !== 0);
};

function parallelSection() {
  const metric = summaryRuns().map((run) => run.headline).find(Boolean);
  if (pageRuns.size < 3 || !metric || !differing(summaryRuns()).length) return [];
  const plot = () => parallelPlot(differing(shownRuns(false)).slice(0, 8), metric);
  const card = makeCard("parallel", `Configurations and the best ${metric}`, plot, { kind: "line", wide: true });
  card.kind = "configs";
  return [make("details", { open: true, className: "group" }, make("summary", {}, make("h2", {}, "Configurations")), make("div", { className: "grid" }, card.element))];
}

function refreshAll() {
  buildTable();
  buildChips();
  buildFindings();
  buildCharts();
  buildParameters();
  refreshCharts();
}

function refreshCharts() {
  for (const card of cards.values()) {
    if (card.id === "parameter" && openRow === null) continue;
    card.element.hidden = false;
    card.refresh();
  }
}

function buildControls() {
  const units = [["step", "step"], ["time", "time"], ["epoch", "epoch"]];
  const unit = make("select", { id: "unit" }, ...units.map(([value, text]) => make("option", { value }, text)));
  unit.addEventListener("change", () => {
    view.unit = unit.value;
    zoom = null;
    refreshCharts();
  });
  const slider = make("input", { id: "smoothing", type: "range", min: "0", max: "20", step: "1", value: String(view.smoothing), title: "the share of a noisy curve, in per cent, that its mean is taken over" });
  slider.addEventListener("input", () => {
    view.smoothing = Number(slider.value);
    refreshCharts();
  });
  const parts = [make("label", {}, "x ", unit), make("label", {}, "smoothing ", slider)];
  if (pageRuns.size > 1 || live) {
    const search = make("input", { id: "search", type: "search", placeholder: "filter runs: a name, lr=0.1 ...", "aria-label": "filter runs" });
    search.addEventListener("input", () => {
      view.search = search.value;
      refreshAll();
    });
    const all = make("button", { className: "small", onclick: () => choose(true) }, "all");
    const none = make("button", { className: "small", onclick: () => choose(false) }, "none");
    parts.push(search, all, none, make("div", { id: "chips" }));
  }
  document.getElementById("controls").replaceChildren(...parts);
}

function choose(on) {
  for (const run of summaryRuns().filter(searched).slice(0, live ? 60 : undefined)) {
    if (on) view.shown.add(run.id);
    else view.shown.delete(run.id);
    if (on && live) live.load(run);
  }
  refreshAll();
}

function remember(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch {
    return null; // a browser may keep nothing for a file
  }
}

function startTheme() {
  const chooser = document.getElementById("theme");
  const set = (theme) => {
    document.documentElement.dataset.theme = theme;
    refreshCharts();
  };
  chooser.value = remember("pytracker-theme") || "auto";
  chooser.addEventListener("change", () => set(remember("pytracker-theme", chooser.value) || chooser.value));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refreshCharts);
  document.documentElement.dataset.theme = chooser.value;
}

// The server's side of a live page. Nothing piles up: a run's curves replace those that were there.
class Live {
  constructor() {
    this.version = 0;
    this.loading = new Set();
  }

  async ask(path) {
    const answer = await fetch(path, { credentials: "same-origin" });
    if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
    return answer.json();
  }

  async load(run) {
    if (!run || this.loading.has(run.id) || (run.curves && run.loaded === run.version)) return;
    this.loading.add(run.id);
    try {
      const wanted = run.version;
      const curves = unpacked(await this.ask(`api/runs/${encodeURIComponent(run.id)}`));
      const now = pageRuns.get(run.id);
      Object.assign(now, { curves, loaded: wanted });
    } finally {
      this.loading.delete(run.id);
    }
  }

  async poll() {
    const begun = performance.now();
    const answer = await this.ask(`api/runs?since=${this.version}`);
    const first = this.version === 0;
    this.version = answer.version;
    for (const id of answer.gone) {
      pageRuns.delete(id);
      view.shown.delete(id);
    }
    const before = new Map(answer.runs.map((run) => [run.id, pageRuns.get(run.id)?.loaded]));
    takeRows(answer.runs, answer.names);
    for (const [id, loaded] of before) pageRuns.get(id).loaded = loaded;
    if (first) answer.runs.slice(0, NEWEST).forEach((run) => view.shown.add(run.id));
    else answer.runs.filter((run) => run.state === "running" && view.shown.size < NEWEST).forEach((run) => view.shown.add(run.id));
    const stale = [...pageRuns.values()].filter((run) => view.shown.has(run.id) && run.loaded !== run.version);
    for (const run of stale) await this.load(run);
    if (first || answer.runs.length || answer.gone.length || stale.length) refreshAll();
    return Math.max(POLL, 5 * (performance.now() - begun));
  }

  async run() {
    for (;;) {
      let pause = POLL;
      try {
        pause = await this.poll();
        document.body.dataset.lost = "";
      } catch (error) {
        document.body.dataset.lost = "the server does not answer";
        if (!(error instanceof TypeError)) document.body.dataset.lost = String(error.message || error);
      }
      document.body.dataset.drawn = "yes";
      await new Promise((done) => setTimeout(done, document.hidden ? 5 * pause : pause));
    }
  }
}

const live = frozen ? null : new Live();

function start() {
  startTheme();
  if (live) {
    buildControls();
    live.run();
    return;
  }
  const report = JSON.parse(frozen.textContent);
  takeRows(report.runs, report.names);
  for (const [id, curves] of Object.entries(report.curves)) {
    pageRuns.get(id).curves = unpacked(curves);
    view.shown.add(id);
  }
  if (pageRuns.size > 1) table.sort = "name", (table.descending = false);
  buildControls();
  refreshAll();
  document.body.dataset.drawn = "yes";
}

start();
