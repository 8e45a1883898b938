// The table of runs, the chips that switch them, and the findings.
"use strict";

const FIRST_ROWS = 100;
const table = { sort: "created", descending: true, all: false, open: new Set() };

const summaryRuns = () => [...pageRuns.values()];
const searched = (run) => {
  const words = view.search.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  const text = `${run.name} ${run.state} ${run.tags.map((tag) => `tags=${tag}`).join(" ")} ${Object.entries(run.config).map(([key, value]) => `${key}=${short(value)}`).join(" ")}`.toLowerCase();
  return words.every((word) => text.includes(word));
};

// The keys of the configurations that are not the same in all runs.
function differing(runs) {
  const keys = new Set(runs.flatMap((run) => Object.keys(run.config)));
  if (runs.length < 2) return [];
  return [...keys].filter((key) => new Set(runs.map((run) => JSON.stringify(run.config[key]) ?? "")).size > 1);
}

const judgedNames = () => Object.keys(pageNames).filter((name) => pageNames[name].goal && summaryRuns().some((run) => run.metrics[name]));

function columnsOf(runs) {
  const fixed = [
    { key: "name", title: "run", value: (run) => run.name },
    { key: "state", title: "state", value: (run) => run.state },
    { key: "steps", title: "steps", number: true, value: (run) => run.steps },
    { key: "seconds", title: "time", number: true, value: (run) => run.seconds, text: (run) => duration(run.seconds) },
    { key: "created", title: "started", value: (run) => run.created, text: (run) => (run.created ? new Date(1000 * run.created).toISOString().slice(0, 16).replace("T", " ") : "") },
    ...(runs.some((run) => run.tags.length) ? [{ key: "tags", title: "tags", value: (run) => run.tags.join(", ") }] : []),
    ...(runs.some((run) => run.facts.group) ? [{ key: "group", title: "group", value: (run) => run.facts.group }] : []),
    { key: "findings", title: "findings", number: true, value: (run) => run.findings },
  ];
  const metrics = judgedNames().slice(0, 12).flatMap((name) => [
    { key: `best:${name}`, title: `best ${name}`, number: true, goal: pageNames[name].goal, value: (run) => run.metrics[name]?.best,
      hint: (run) => (run.metrics[name] ? `at step ${run.metrics[name].best_step}; last ${short(run.metrics[name].last)}` : "") },
    { key: `last:${name}`, title: "last", number: true, value: (run) => run.metrics[name]?.last },
  ]);
  const configs = differing(runs).map((key) => ({
    key: `config:${key}`, title: key, number: runs.every((run) => typeof run.config[key] === "number" || run.config[key] === undefined), value: (run) => run.config[key],
  }));
  return [...fixed, ...configs, ...metrics];
}

function compareBy(column) {
  const direction = table.descending ? -1 : 1;
  const missing = (value) => value === undefined || value === null || Number.isNaN(value);
  return (a, b) => {
    const [left, right] = [column.value(a), column.value(b)];
    if (missing(left) || missing(right)) return missing(left) - missing(right);
    if (typeof left === "number" && typeof right === "number") return direction * (left - right);
    return direction * String(short(left)).localeCompare(String(short(right)), undefined, { numeric: true });
  };
}

function buildTable() {
  const runs = summaryRuns();
  const columns = columnsOf(runs);
  const chosen = columns.find((column) => column.key === table.sort) || columns[0];
  const rows = runs.filter(searched).sort(compareBy(chosen));
  const best = new Map();
  for (const column of columns.filter((each) => each.goal)) {
    const values = rows.map(column.value).filter(Number.isFinite);
    if (values.length > 1) best.set(column.key, column.goal === "max" ? Math.max(...values) : Math.min(...values));
  }
  const head = columns.map((column) => {
    const sorted = column.key === chosen.key ? (table.descending ? "descending" : "ascending") : "none";
    const button = make("button", { className: "sort", onclick: () => sortBy(column) }, column.title, sorted === "none" ? "" : sorted === "ascending" ? " ▲" : " ▼");
    return make("th", { "aria-sort": sorted, className: column.number ? "number" : "", title: column.title, data: { key: column.key } }, button);
  });
  const shown = table.all ? rows : rows.slice(0, FIRST_ROWS);
  const body = shown.flatMap((run) => {
    const cells = columns.map((column) => {
      const value = column.value(run);
      const text = column.text ? column.text(run) : short(value);
      if (column.key === "name") return make("td", { className: "name", title: run.name }, nameCell(run));
      if (column.key === "state") return make("td", { title: run.error || "" }, make("span", { className: "state", data: { state: run.state } }, run.state));
      const properties = { className: column.number ? "number" : "", title: column.hint ? column.hint(run) : text };
      if (column.key === "findings" && run.severity) Object.assign(properties, { data: { severity: run.severity } });
      return make("td", properties, best.get(column.key) === value && value !== undefined ? make("b", {}, text) : text);
    });
    const line = make("tr", { data: { run: run.id } }, ...cells);
    return table.open.has(run.id) ? [line, make("tr", { className: "details" }, make("td", { colSpan: columns.length }, details(run)))] : [line];
  });
  const more = rows.length > shown.length ? make("button", { className: "small", onclick: () => { table.all = true; buildTable(); } }, `show all ${rows.length}`) : null;
  document.getElementById("summary").replaceChildren(
    make("div", { className: "head" }, make("h2", {}, "Summary"), make("span", { className: "note" }, runs.length > 1 ? `${rows.length} of ${runs.length} runs` : ""), more),
    make("div", { className: "card scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body))),
  );
}

function nameCell(run) {
  const mark = make("span", { className: "dot", style: { background: run.look.color } });
  const more = make("button", { className: "plain", title: "config and facts", onclick: () => { table.open.delete(run.id) || table.open.add(run.id); buildTable(); } }, run.name);
  if (pageRuns.size < 2) return make("span", { className: "cell" }, mark, more);
  const box = make("input", { type: "checkbox", checked: view.shown.has(run.id), "aria-label": "show in the charts", onchange: () => switchRun(run.id) });
  return make("span", { className: "cell" }, box, mark, more);
}

function details(run) {
  const pairs = Object.entries({ ...run.config, ...run.facts, unjudged: null, error: run.error }).filter(([, value]) => value !== null && value !== undefined);
  return make("dl", {}, ...pairs.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, short(value))]));
}

function sortBy(column) {
  table.descending = table.sort === column.key ? !table.descending : column.goal === "max" || (column.number && !column.goal);
  table.sort = column.key;
  buildTable();
}

// A button a run, in its colour and dash: pressed, its curves are drawn.
function buildChips() {
  const holder = document.getElementById("chips");
  if (!holder) return;
  const runs = summaryRuns().filter((run) => searched(run) && (view.shown.has(run.id) || run.curves || pageRuns.size <= 100)).slice(0, 200);
  holder.replaceChildren(...runs.map((run) => {
    const dash = run.look.dash === "solid" ? "solid" : run.look.dash.includes("dot") ? "dotted" : "dashed";
    const mark = make("span", { className: "swatch", style: { borderTop: `3px ${dash} ${run.look.color}` } });
    return make("button", { className: "chip", title: run.name, data: { run: run.id }, "aria-pressed": String(view.shown.has(run.id)), onclick: () => switchRun(run.id) }, mark, make("span", { className: "cut" }, run.name));
  }));
}

function buildFindings() {
  const order = ["critical", "warning", "info"];
  const rank = (finding) => (order.includes(finding.severity) ? order.indexOf(finding.severity) : 3);
  const runs = shownRuns();
  const found = runs.flatMap((run) => run.curves.findings.map((finding) => ({ run, finding })));
  found.sort((a, b) => rank(a.finding) - rank(b.finding) || (a.finding.first_step || 0) - (b.finding.first_step || 0));
  const list = found.slice(0, 40).map(({ run, finding }) => findingCard(run, finding, runs.length > 1 || pageRuns.size > 1));
  const more = found.length > 40 ? [make("p", { className: "note" }, `and ${found.length - 40} less severe`)] : [];
  const silent = runs.flatMap((run) => notJudged(run).map((line) => make("p", { className: "note unjudged" }, pageRuns.size > 1 ? `${run.name}: ${line}` : line)));
  const block = make("details", { open: found.length <= (runs.length > 1 ? 3 : 8) }, make("summary", {}, make("h2", {}, `Findings (${found.length})`)), ...list, ...more, ...silent);
  document.getElementById("findings").replaceChildren(...(found.length || silent.length ? [block] : []));
}

// Silence is not health: which rules could not judge a run, a line for each reason.
function notJudged(run) {
  const reasons = new Map();
  for (const [rule, why] of Object.entries(run.facts.unjudged || {})) reasons.set(String(why), [...(reasons.get(String(why)) || []), rule]);
  return [...reasons].map(([why, rules]) => `not judged: ${rules.join(", ")}: ${why}`);
}

function findingCard(run, finding, named) {
  const [first, last] = [finding.first_step || 0, finding.last_step || finding.first_step || 0];
  const place = make("button", { className: "link", data: { first, last }, onclick: () => showSteps(run, first, last) }, first === last ? `step ${first}` : `steps ${first} to ${last}`);
  const who = named ? [make("span", { className: "dot", style: { background: run.look.color } }), ` ${run.name}: `] : [];
  const facts = { parameters: (finding.parameters || []).join(", "), cause: finding.cause, action: finding.action };
  const shown = Object.entries(facts).filter(([, text]) => text).flatMap(([key, text]) => [make("dt", {}, key), make("dd", {}, String(text))]);
  return make("div", { className: "card finding", data: { severity: String(finding.severity) } },
    make("h3", {}, ...who, `${finding.severity}: ${finding.title} `, place), make("p", {}, String(finding.evidence || "")), make("dl", {}, ...shown));
}

function showSteps(run, first, last) {
  const room = Math.max(20, 2 * (last - first));
  const range = along(run.curves, [Math.max(0, first - room), last + room], view.unit);
  if (range) showRange(range);
}
