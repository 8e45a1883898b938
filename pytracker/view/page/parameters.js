// The parameters of one run: heat maps, a row of which opens as a curve; how the norms spread; and configs side by side.
"use strict";

const SCALE = [[0, "#1b1035"], [0.25, "#5a2a7a"], [0.5, "#b13f6e"], [0.75, "#ee7d4f"], [1, "#fbe3a0"]]; // as well without colour
const MAPS = [
  ["norm", "Gradient norm by parameter", true],
  ["zero_fraction", "Share of zeros in the gradient", false],
  ["abs_max", "Largest element of the gradient", true],
  // where it was measured:
  ["update_ratio", "Update relative to the parameter, of single steps", true],
  ["subnormal_bf16_fraction", "Share of the gradient that is subnormal in bf16", false],
  ["subnormal_fp16_fraction", "Share of the gradient that is subnormal in fp16", false],
  ["subnormal_e4m3_fraction", "Share of the gradient that is subnormal in fp8 e4m3", false],
];
let mapRun = null; // the id of the run whose parameters are shown
let openRow = null; // the row of the heat maps that is open as a curve

const mapsOf = () => pageRuns.get(mapRun)?.curves?.parameters || null;

function rowsOf(flat, columns) {
  const rows = [];
  for (let at = 0; at < flat.length; at += columns) rows.push(Array.from(flat.subarray(at, at + columns), (v) => (Number.isNaN(v) ? null : v)));
  return rows;
}

function heatmap(which, logarithmic, card) {
  const maps = mapsOf();
  if (!maps?.tables[which]) return null;
  const columns = maps.edges.length - 1;
  let z = rowsOf(maps.tables[which], columns);
  let [low, high, bar] = [0, 1, { tickformat: ".0%" }];
  if (logarithmic) {
    const positive = maps.tables[which].filter((value) => value > 0);
    low = Math.floor(Math.log10(positive.reduce((a, b) => Math.min(a, b), Infinity)));
    high = Math.max(Math.ceil(Math.log10(positive.reduce((a, b) => Math.max(a, b), 0))), low + 1);
    if (!Number.isFinite(low)) [low, high] = [-1, 0];
    z = z.map((row) => row.map((value) => (value === null ? null : value > 0 ? Math.log10(value) : low)));
    const ticks = [];
    for (let tick = low; tick <= high; tick += Math.max(1, Math.round((high - low) / 6))) ticks.push(tick);
    bar = { tickvals: ticks, ticktext: ticks.map((tick) => `10<sup>${tick}</sup>`) };
  }
  const labels = maps.labels.map(plain);
  const narrow = card.chart.clientWidth < 420;
  const data = [{
    type: "heatmap", x: Array.from(maps.edges), y: labels, z, zmin: low, zmax: high, colorscale: SCALE,
    colorbar: { thickness: 10, len: 1, outlinewidth: 0, ...bar },
    hovertemplate: `%{y}<br>from step %{x}<br>${logarithmic ? "10^%{z:.2f}" : "%{z:.1%}"}<extra></extra>`, meta: { run: mapRun },
  }];
  if (maps.bad.length) {
    data.push({
      type: "scatter", mode: "markers", name: "not finite", showlegend: false,
      x: maps.bad.map(([, column]) => (maps.edges[column] + maps.edges[column + 1]) / 2), y: maps.bad.map(([row]) => labels[row]),
      marker: { symbol: "x", size: 7, color: "#00d5ff", line: { color: "#00222b", width: 1 } },
      hovertemplate: "%{y}<br>NaN or Inf near step %{x}<extra></extra>", meta: { run: mapRun },
    });
  }
  card.note.textContent = `grey: ${which === "update_ratio" ? "not measured" : "no gradient"}; x: NaN or Inf${maps.grouped ? "; a row shows the largest of neighbours" : ""}; click a row for its curve`;
  return {
    data,
    height: Math.min(Math.max(labels.length * 16 + 90, 240), 1100),
    layout: {
      margin: { l: narrow ? 8 : 10, r: 0 }, plot_bgcolor: style("--gap"), hovermode: "closest",
      xaxis: { title: { text: "step", standoff: 4 }, showgrid: false },
      yaxis: { type: "category", autorange: "reversed", automargin: !narrow, showticklabels: !narrow, tickfont: { size: 10 }, showgrid: false },
    },
  };
}

function bandsPlot() {
  const maps = mapsOf();
  if (!maps) return null;
  const x = Array.from(maps.edges.subarray(0, -1));
  const line = (which) => Array.from(maps.bands[which], (value) => (value > 0 ? value : null));
  const data = [];
  for (const [low, high, opacity] of [["0", "100", 0.1], ["10", "90", 0.18], ["25", "75", 0.3]]) {
    const shared = { type: "scatter", mode: "lines", x, line: { width: 0 }, connectgaps: true, meta: { run: mapRun } };
    data.push({ ...shared, y: line(low), showlegend: false, hovertemplate: `${low} %: %{y:.3g}<extra></extra>` });
    data.push({
      ...shared, y: line(high), fill: "tonexty", fillcolor: `rgba(47,111,222,${opacity})`,
      name: low === "0" ? "all" : `${low} to ${high} %`, hovertemplate: `${high} %: %{y:.3g}<extra></extra>`,
    });
  }
  data.push({ type: "scatter", mode: "lines", x, y: line("50"), name: "median", line: { color: "#2f6fde", width: 2 }, meta: { run: mapRun, series: "median norm" }, hovertemplate: "median: %{y:.3g}<extra></extra>" });
  return {
    data,
    layout: {
      hovermode: "x unified", showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      xaxis: { title: { text: "step", standoff: 4 } }, yaxis: { type: "log" },
    },
  };
}

function rowPlot(card) {
  const maps = mapsOf();
  if (!maps || openRow === null || openRow >= maps.labels.length) return null;
  const columns = maps.edges.length - 1;
  const x = Array.from(maps.edges.subarray(0, -1));
  const part = (which) => Array.from(maps.tables[which].subarray(openRow * columns, (openRow + 1) * columns), (value) => (value > 0 ? value : null));
  card.element.querySelector("h3").textContent = maps.labels[openRow];
  return {
    data: [["norm", "norm"], ["abs_max", "largest element"]].map(([which, name], index) => ({
      type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers", x, y: part(which), name, line: { color: COLORS[index], width: 1.6 },
      meta: { run: mapRun, series: `${maps.labels[openRow]} ${name}` }, hovertemplate: `${name} %{y:.4g}<extra></extra>`,
    })),
    layout: {
      hovermode: "x unified", showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
      xaxis: { title: { text: "step", standoff: 4 } }, yaxis: { type: "log" },
    },
  };
}

function buildParameters() {
  const section = document.getElementById("parameters");
  const known = shownRuns().filter((run) => run.curves.parameters);
  if (!known.some((run) => run.id === mapRun)) mapRun = known.length ? known[0].id : null;
  const chooser = document.getElementById("map-run");
  if (chooser) {
    chooser.replaceChildren(...known.map((run) => make("option", { value: run.id, selected: run.id === mapRun }, run.name)));
    chooser.hidden = known.length < 2;
    section.hidden = !known.length;
    return;
  }
  if (!known.length) return;
  section.hidden = false;
  const select = make("select", { id: "map-run", "aria-label": "run shown below", hidden: known.length < 2 });
  select.append(...known.map((run) => make("option", { value: run.id }, run.name)));
  select.addEventListener("change", () => {
    mapRun = select.value;
    openRow = null;
    refreshParameters();
  });
  const row = makeCard("parameter", "", rowPlot, { kind: "parameter", wide: true });
  const bands = makeCard("bands", "Gradient norms over all parameters", bandsPlot, { kind: "parameter", wide: true });
  const maps = MAPS.map(([which, title, logarithmic], index) => {
    const card = makeCard(`map-${which}`, title, (self) => heatmap(which, logarithmic, self), { kind: "map", height: 240, wide: index === 0 });
    card.clicked = (event) => {
      openRow = mapsOf().labels.map(plain).indexOf(event.points[0].y);
      row.element.hidden = false;
      row.visible = true;
      row.refresh();
      row.element.scrollIntoView({ block: "nearest" });
    };
    return card;
  });
  row.element.hidden = true;
  const grid = make("div", { className: "grid" }, bands.element, maps[0].element, row.element, ...maps.slice(1).map((card) => card.element));
  section.append(make("div", { className: "head" }, make("h2", {}, "Parameters"), select), grid);
}

function refreshParameters() {
  for (const card of cards.values()) {
    if (card.kind === "line" || (card.id === "parameter" && openRow === null)) continue;
    card.element.hidden = false;
    card.refresh();
  }
}

// Configurations against the best value: a line a run, an axis for each key that differs and one for the value.
function parallelPlot(keys, metric) {
  const runs = shownRuns(false).filter((run) => Number.isFinite(run.metrics[metric]?.best));
  if (runs.length < 3 || !keys.length) return null;
  const goal = pageNames[metric].goal;
  const axes = [...keys.map((key) => [key, (run) => run.config[key]]), [metric, (run) => run.metrics[metric].best]];
  const bests = runs.map((run) => run.metrics[metric].best);
  const [worst, best] = goal === "max" ? [Math.min(...bests), Math.max(...bests)] : [Math.max(...bests), Math.min(...bests)];
  const annotations = [];
  const columns = axes.map(([name, get], at) => {
    const values = runs.map(get);
    const numbers = values.every((value) => typeof value === "number");
    const logs = numbers && values.every((value) => value > 0) && Math.max(...values) / Math.min(...values) > 20;
    const levels = [...new Set(values.map(short))].sort();
    const scale = (value) => (!numbers ? levels.indexOf(short(value)) : logs ? Math.log(value) : value);
    const scaled = values.map(scale);
    const [low, high] = [Math.min(...scaled), Math.max(...scaled)];
    const label = (text, y) => annotations.push({ x: at, y, text: plain(String(text).slice(0, 18)), showarrow: false, xanchor: at ? "right" : "left", xshift: at ? -6 : 6, font: { size: 10 }, bgcolor: style("--card") });
    if (numbers) {
      label(short(Math.max(...values)), 1);
      if (high > low) label(short(Math.min(...values)), 0);
    } else if (levels.length <= 8) levels.forEach((level, index) => label(level, levels.length > 1 ? index / (levels.length - 1) : 0.5));
    return scaled.map((value) => (high > low ? (value - low) / (high - low) : 0.5));
  });
  return {
    data: runs.map((run, index) => {
      const share = worst === best ? 1 : (run.metrics[metric].best - worst) / (best - worst);
      return {
        type: "scatter", mode: "lines+markers", x: axes.map((_, at) => at), y: columns.map((column) => column[index]),
        line: { color: `hsl(${Math.round(20 + 190 * share)}, 70%, 48%)`, width: 1 + 2 * share }, opacity: 0.35 + 0.6 * share,
        hovertemplate: `${plain(run.name)}<br>${plain(metric)} ${short(run.metrics[metric].best)}<extra></extra>`, meta: { run: run.id },
      };
    }),
    layout: {
      hovermode: "closest", showlegend: false, annotations, margin: { l: 30, r: 30 },
      xaxis: { tickvals: axes.map((_, at) => at), ticktext: axes.map(([name]) => plain(name.length > 18 ? `...${name.slice(-16)}` : name)), range: [-0.15, axes.length - 0.85], showgrid: true, fixedrange: true },
      yaxis: { visible: false, range: [-0.08, 1.08], fixedrange: true },
    },
  };
}
