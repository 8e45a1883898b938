// Draws the charts of a report, and ties them together: runs switched on and off, zooming, findings, heat maps.
"use strict";

const report = JSON.parse(document.getElementById("report").textContent);
const hidden = new Set(); // runs switched off
const lines = [];         // the elements of the line charts, which share their steps
const maps = [];          // likewise of the heat maps
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const settings = { responsive: true, displayModeBar: false };

function themed(chart) {
  const grid = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line") };
  const map = chart.kind === "map";
  return {
    ...chart.layout,
    height: chart.layout.height || 300,
    margin: { l: map ? 10 : 56, r: map ? 0 : 12, t: 8, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: map ? style("--gap") : "rgba(0,0,0,0)",
    font: { color: style("--ink"), family: "system-ui, sans-serif", size: 12 },
    hoverlabel: { align: "left" },
    showlegend: false,
    xaxis: { ...grid, ...chart.layout.xaxis, showgrid: !map },
    yaxis: { ...grid, ...chart.layout.yaxis, showgrid: !map },
    ...(map ? {} : { yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true } }),
  };
}

function draw(element, chart) {
  const data = chart.data.map((trace) => ({ ...trace, visible: !hidden.has(trace.meta.run) }));
  const layout = themed(chart);
  // A long name must not push the map off a narrow window.
  if (chart.kind === "map" && element.clientWidth < 420) {
    layout.yaxis.automargin = false;
    layout.yaxis.showticklabels = false;
  }
  return Plotly.react(element, data, layout, settings);
}

// Zooming one chart zooms the others of its kind to the same steps.
let following = false;
async function follow(group, source, change) {
  if (following) return;
  const all = change["xaxis.autorange"];
  const range = change["xaxis.range"] || [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  if (!all && range[0] === undefined) return;
  following = true;
  const update = all ? { "xaxis.autorange": true } : { "xaxis.range": range };
  await Promise.all(group.filter((other) => other !== source).map((other) => Plotly.relayout(other, update)));
  following = false;
}

function switchRun(chip) {
  const run = Number(chip.dataset.run);
  const off = !hidden.delete(run) && hidden.add(run);
  chip.setAttribute("aria-pressed", String(!off));
  for (const element of lines) {
    const touched = element.data.flatMap((trace, index) => (trace.meta.run === run ? [index] : []));
    if (touched.length) Plotly.restyle(element, { visible: !off }, touched);
  }
}

function showSteps(link) {
  const first = Number(link.dataset.first);
  const last = Number(link.dataset.last);
  const room = Math.max(20, 2 * (last - first));
  const range = [Math.max(0, first - room), last + room];
  for (const element of lines) Plotly.relayout(element, { "xaxis.range": range });
}

async function showMaps(run) {
  const chosen = report.maps.filter((chart) => chart.run === run);
  for (const [index, element] of maps.entries()) {
    if (chosen[index]) await draw(element, chosen[index]);
  }
}

async function start() {
  for (const chart of report.lines) {
    const element = document.getElementById(chart.id);
    lines.push(element);
    await draw(element, chart);
    element.on("plotly_relayout", (change) => follow(lines, element, change));
  }
  if (report.maps.length) {
    maps.push(...document.querySelectorAll(".chart.map"));
    await showMaps(report.maps[0].run);
    for (const element of maps) element.on("plotly_relayout", (change) => follow(maps, element, change));
  }
  for (const chip of document.querySelectorAll(".chip")) chip.addEventListener("click", () => switchRun(chip));
  for (const link of document.querySelectorAll("a[data-first]")) link.addEventListener("click", () => showSteps(link));
  for (const button of document.querySelectorAll("button.log")) {
    button.addEventListener("click", () => {
      const log = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(log));
      const scale = { "yaxis.type": log ? "log" : "linear", "yaxis.autorange": true, "yaxis.dtick": null };
      Plotly.relayout(button.dataset.chart, scale);
    });
  }
  const chooser = document.getElementById("map-run");
  if (chooser) chooser.addEventListener("change", () => showMaps(Number(chooser.value)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => location.reload());
  document.body.dataset.drawn = "yes";
}

start();
