// Values as the page writes and reads them, and elements made without ever reading text as HTML.
"use strict";

// An element with properties, listeners and children; a string becomes a text node, so nothing in it can act.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// Plotly reads a little HTML and its own %{} in names and hover texts.
const plain = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "% {");

const TYPES = { i4: Int32Array, f4: Float32Array, f8: Float64Array };

function unpack(spec) {
  const bytes = Uint8Array.from(atob(spec.bdata), (letter) => letter.charCodeAt(0));
  return new TYPES[spec.dtype](bytes.buffer);
}

function short(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return typeof value === "string" ? value : JSON.stringify(value);
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const text = value.toPrecision(4);
  return text.includes("e") ? String(Number(text)) : text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function duration(seconds) {
  if (!Number.isFinite(seconds)) return "";
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${Math.floor(seconds / 60)} m ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} m` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

// y at each of `places`, on the straight lines between the points (x, y); x ascends.
function interpolate(places, x, y) {
  let at = 0;
  return Array.from(places, (place) => {
    if (!x.length) return null;
    while (at < x.length - 2 && x[at + 1] < place) at += 1;
    if (x.length === 1 || place <= x[0]) return y[0];
    if (place >= x[x.length - 1]) return y[y.length - 1];
    return y[at] + ((y[at + 1] - y[at]) * (place - x[at])) / (x[at + 1] - x[at] || 1);
  });
}

// The mean of each point's neighbours, as many to the left as to the right, so that nothing moves sideways; at an end
// only a third of them, so that the curve does not hook after its last value.
function movingMean(y, share) {
  const reach = Math.max(1, Math.round((share / 200) * y.length));
  const sums = [0];
  const counts = [0];
  for (const value of y) {
    const known = Number.isFinite(value);
    sums.push(sums[sums.length - 1] + (known ? value : 0));
    counts.push(counts[counts.length - 1] + (known ? 1 : 0));
  }
  return Array.from(y, (_, index) => {
    const near = Math.max(Math.min(reach, index, y.length - 1 - index), Math.ceil(reach / 3));
    const [from, to] = [Math.max(0, index - near), Math.min(y.length, index + near + 1)];
    const count = counts[to] - counts[from];
    return count ? (sums[to] - sums[from]) / count : null;
  });
}

// How far a curve goes up and down in all.
function travel(y) {
  let sum = 0;
  let last = null;
  for (const value of y) {
    if (!Number.isFinite(value)) continue;
    if (last !== null) sum += Math.abs(value - last);
    last = value;
  }
  return sum;
}

function download(name, text, type) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

// A cell of a CSV file; a text that a spreadsheet would evaluate begins with an apostrophe.
function cell(value) {
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}
