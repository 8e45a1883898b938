// What is drawn: which series share a chart, and the lines, marks and ranges of each. No element is touched here.
"use strict";

const COLORS = ["#2f6fde", "#d9541e", "#139a6b", "#9b51c9", "#c98a00", "#0c97b5", "#c7417b", "#7a7f87", "#5b8c1f", "#8a5a44"];
const SEVERITIES = { critical: "#d33333", warning: "#e69500", info: "#3a87c8" };
const TITLES = {
  grad_norm: "Gradient norm",
  grad_abs_max: "Largest gradient element",
  grad_nonfinite: "Gradient elements that are NaN or Inf",
  grad_zero_fraction: "Share of gradient elements that are zero",
};
const GROUPS = ["Metrics", "Learning rate", "Gradients"];
const LEGEND_LINES = 12; // in a chart; beyond it the table is the legend
const FAR = 20; // so many times the usual
const NOISY = 3; // so many times as far up and down as its mean

// Colours come again after ten runs, and then with another dash.
function look(index) {
  const turn = Math.floor(index / COLORS.length);
  const dashes = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const dash = dashes[turn] || `${2 * turn}px,${turn}px`;
  return { color: COLORS[index % COLORS.length], dash };
}

// The charts of a page, from the names of its metrics: [{ id, title, group, names }].
function chartsOf(names) {
  const charts = new Map();
  for (const [name, known] of Object.entries(names)) {
    if (name === "epoch") continue;
    const rate = known.group === "Learning rate";
    const plain = name.split("/").slice(0, 2).pop(); // without the name of a player
    const norm = plain === "grad_norm" || plain === "grad_max";
    const key = rate ? "lr" : norm ? name.replace(/grad_max$/, "grad_norm") : `${known.group}/${known.subject.toLowerCase()}`;
    const title = rate ? "Learning rate" : norm ? TITLES.grad_norm : TITLES[plain] || known.subject;
    if (!charts.has(key)) charts.set(key, { id: key, title, group: known.group, names: [] });
    charts.get(key).names.push(name);
  }
  const place = (chart) => (GROUPS.includes(chart.group) ? GROUPS.indexOf(chart.group) : chart.group === "More" ? 99 : 50);
  return [...charts.values()].sort((a, b) => place(a) - place(b));
}

// The x of some steps of a run, in the unit that the page shows; null where the run does not know it.
function along(curves, steps, unit) {
  if (unit === "step") return Array.from(steps);
  const known = unit === "time" ? curves.clock : curves.epochs;
  return known ? interpolate(steps, known.x, known.y) : null;
}

// The lines that a chart draws: [{ run, name, line, x, color, dash, width }].
function linesOf(chart, runs, unit) {
  const lines = [];
  for (const run of runs) {
    for (const [index, name] of chart.names.entries()) {
      const line = run.curves.series[name];
      const x = line && along(run.curves, line.x, unit);
      if (!x) continue;
      const held = pageNames[name].split === "val";
      const second = name === "grad_max" || (chart.id === "lr" && index > 0);
      const alone = runs.length === 1 ? look(index) : run.look;
      lines.push({
        run, name, line, x,
        color: alone.color,
        dash: second ? "dot" : run.look.dash,
        width: held ? 2.4 : 1.3,
        markers: line.x.length === 1 || (held && line.x.length <= 60),
      });
    }
  }
  return lines;
}

function tracesOf(lines, smoothing, unit) {
  const named = new Set(lines.map((each) => each.name)).size > 1;
  const many = new Set(lines.map((each) => each.run.id)).size > 1;
  const traces = [];
  for (const each of lines) {
    const { run, name, line, x, color, dash, width } = each;
    const label = plain(many ? (named ? `${run.name} ${name}` : run.name) : name);
    const source = line.means || line;
    const mean = smoothing > 0 && line.y.length > 20 ? movingMean(source.y, smoothing) : null;
    const smooth = mean !== null && travel(line.y) > NOISY * travel(mean);
    const meta = { run: run.id, series: name };
    traces.push({
      type: "scatter",
      mode: line.x.length === 1 ? "markers" : each.markers ? "lines+markers" : "lines",
      name: label, x, y: line.y, meta,
      line: { color, width: smooth ? 1 : width, dash },
      opacity: smooth ? 0.3 : 1,
      marker: { size: line.x.length === 1 ? 9 : 5, color, symbol: pageNames[name].split === "val" ? "circle-open" : "circle" },
      hovertemplate: `${label} %{y:.5g}<extra></extra>`,
      showlegend: !smooth,
    });
    if (smooth) {
      traces.push({
        type: "scatter", mode: "lines", name: label, x: along(run.curves, source.x, unit), y: mean,
        meta: { ...meta, smooth: true }, line: { color, width: Math.max(width, 1.8), dash }, hoverinfo: "skip",
      });
    }
  }
  return traces;
}

// What lies under the curve of the run and the metric that a finding speaks of, and nowhere else.
function findingTraces(lines, unit) {
  const traces = [];
  for (const { run, name, line } of lines) {
    for (const finding of run.curves.findings) {
      if (!finding.series.includes(name)) continue;
      const [first, last] = [finding.first_step || 0, Math.max(finding.first_step || 0, finding.last_step || 0)];
      const y = line.y.length > 20 ? movingMean(line.y, 4) : line.y;
      const places = [...line.x.keys()].filter((at) => line.x[at] >= first && line.x[at] <= last);
      if (!places.length) continue;
      traces.push({
        type: "scatter", mode: places.length > 1 ? "lines" : "markers",
        name: plain(finding.title), meta: { run: run.id, series: name, finding: finding.title }, showlegend: false,
        x: along(run.curves, places.map((at) => line.x[at]), unit), y: places.map((at) => y[at]),
        line: { color: SEVERITIES[finding.severity] || "#888888", width: 11 },
        marker: { color: SEVERITIES[finding.severity] || "#888888", size: 15 },
        opacity: 0.35, hoverinfo: "skip",
      });
    }
  }
  return traces;
}

// Marks at the foot of a chart where a value is NaN or infinite, and at its edge where it lies beyond.
function markTraces(lines, range, unit) {
  const traces = [];
  const mark = (each, steps, y, symbol, what, count) => ({
    type: "scatter", mode: "markers", yaxis: "y2", showlegend: false, name: what,
    x: along(each.run.curves, steps, unit), y: steps.map(() => y),
    meta: { run: each.run.id, series: each.name, [what]: count },
    marker: { symbol, size: 8, color: each.color, line: { color: "#d33333", width: 1 } },
    hovertemplate: `${plain(each.run.name)} ${plain(each.name)}: ${what}<extra></extra>`,
  });
  for (const each of lines) {
    const { line } = each;
    if (line.bad) traces.push(mark(each, Array.from(line.bad.x), 0.02, "x", "not finite", line.bad.count));
    if (!range.clipped) continue;
    for (const [edge, y, symbol, beyond] of [
      ["above", 0.985, "triangle-up", (value) => value > range.high],
      ["below", 0.015, "triangle-down", (value) => value < range.low],
    ]) {
      const all = [...line.x.keys()].filter((at) => beyond(line.y[at]));
      const shown = all.filter((_, index) => index % Math.ceil(all.length / 8) === 0);
      if (all.length) traces.push(mark(each, shown.map((at) => line.x[at]), y, symbol, edge, all.length));
    }
  }
  return traces;
}

// Where the curves of each run spend their lives, and where those of the run in the middle do; null without values.
function usualOf(lines) {
  const ofRuns = new Map();
  for (const { run, line } of lines.filter((each) => each.line.usual)) {
    const [low, high] = ofRuns.get(run.id) || [Infinity, -Infinity];
    ofRuns.set(run.id, [Math.min(low, line.usual[0]), Math.max(high, line.usual[1])]);
  }
  if (!ofRuns.size) return null;
  const runs = [...ofRuns.values()];
  const middle = Math.floor((runs.length - 1) / 2);
  const top = runs.map(([, high]) => high).sort((a, b) => a - b)[middle];
  const bottom = runs.map(([low]) => low).sort((a, b) => b - a)[middle];
  return { runs, top, bottom };
}

// The range of a linear y axis: all values, unless a few runs or moments lie so far out that they flatten the rest.
function rangeOf(lines, whole) {
  const usual = usualOf(lines);
  if (!usual) return { low: 0, high: 1, clipped: false };
  const { runs, top, bottom } = usual;
  const lowest = Math.min(...lines.map(({ line }) => line.low ?? Infinity));
  const highest = Math.max(...lines.map(({ line }) => line.high ?? -Infinity));
  const span = Math.max(top - bottom, 0);
  let [low, high] = [lowest, highest];
  if (!whole && span > 0) {
    const within = (values, limit) => values.filter((value) => Math.abs(value - (top + bottom) / 2) <= limit);
    if (high > top + 4 * span) high = Math.max(top, ...within(runs.map((each) => each[1]), 2.5 * span)) + 0.3 * span;
    if (low < bottom - 4 * span) low = Math.min(bottom, ...within(runs.map((each) => each[0]), 2.5 * span)) - 0.3 * span;
  }
  const clipped = low > lowest || high < highest;
  if (low === high) {
    // A constant is drawn so that the axis names it: half way between nothing and twice as much.
    const half = low === 0 ? 1 : Math.abs(low);
    return { low: low - half, high: high + half, clipped: false, constant: low };
  }
  const room = 0.05 * (high - low);
  return { low: low < highest && low === lowest ? low - room : low, high: high === highest ? high + room : high, clipped };
}

// A chart starts logarithmic where it shows norms, or where its values are positive and span powers of ten: in the run
// in the middle, or in most runs at single moments (the first steps of a loss that falls steeply). Learning rates where
// those of the runs are far apart: a schedule's own fall is read on an even axis.
function asksForLog(chart, lines) {
  const usual = usualOf(lines);
  if (!usual || lines.some(({ line }) => line.low <= 0)) return false;
  if (chart.id === "lr") {
    const peaks = lines.map(({ line }) => line.high);
    return Math.max(...peaks) > FAR * Math.min(...peaks);
  }
  if (chart.id === "grad_norm") return true;
  const far = new Set(lines.filter(({ line }) => line.high > FAR * usual.top).map(({ run }) => run.id));
  const steep = far.size > usual.runs.length / 2 || usual.top / usual.bottom > 1000;
  return steep && pageNames[chart.names[0]].goal !== "max";
}
