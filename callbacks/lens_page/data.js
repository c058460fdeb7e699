// What the page holds, as text and numbers. The scripts of a page are one: this comes first. All text from models and data
// goes through textContent and attributes, never through HTML.
"use strict";

const CELL = { name: 84, head: 26, width: 86, height: 22 };
const WORD = /\p{L}{2,}/u;
const $ = (id) => document.getElementById(id);

// What is looked at: a view (a variant, or their difference), a position, and how the pictures are drawn.
const state = {
  view: null, position: 0, pointed: null, locked: false, layer: 0, all: true,
  overlay: "confidence", tile: 0, word: "", match: "is", masked: false, threshold: 0.1, pair: [0, 1],
};
let page, picture, views, figures, difference, panel, area;

async function inflated(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
}

async function load() {
  const packed = JSON.parse($("data").textContent);
  picture = $("picture");
  const [text, ...arrays] = await Promise.all([
    inflated(packed.page), ...packed.variants.flatMap(({ ids, roots }) => [inflated(ids), inflated(roots)]), picture.decode(),
  ]);
  page = JSON.parse(new TextDecoder().decode(text));
  page.names = page.layers.map((name) => name.replace(/^lm\.(embed|block)/, "$1").replace(/^block\./, "block "));
  page.shown = [];
  page.patches = new Map();
  for (const [number, variant] of page.variants.entries()) {
    variant.ids = new (page.bits === 16 ? Uint16Array : Uint32Array)(arrays[2 * number]);
    const roots = new Uint16Array(arrays[2 * number + 1]);
    variant.p = new Float32Array(roots.length);
    for (let i = 0; i < roots.length; i++) variant.p[i] = (roots[i] / 65535) ** 2;
    variant.length = variant.tokens.length;
    variant.positions = [];
    variant.visual.forEach((visual, position) => { if (visual >= 0) variant.positions[visual] = position; });
  }
  const { ids, length } = page.variants[0];
  page.k = length ? ids.length / (length * page.layers.length) : 0;
}

/** Text with what cannot be seen made visible. */
function visible(text) {
  const signs = { " ": "␣", "\n": "⏎", "\t": "⇥" };
  const code = (sign) => `\\u{${sign.codePointAt(0).toString(16)}}`;
  return text.replace(/[\p{C}\p{Z}]/gu, (sign) => signs[sign] ?? code(sign)) || "∅";
}

/** The text of one of the page's tokens as it is shown. */
const token = (id) => (page.shown[id] ??= visible(page.tokens[id]));

const folded = (text) => text.trim().normalize("NFKC").toLowerCase();

function percent(p) {
  const value = 100 * p;
  if (value >= 99.95) return "100";
  if (value >= 10) return value.toFixed(1);
  return value >= 0.001 ? value.toPrecision(2) : value > 0 ? "<0.001" : "0";
}

/** Number of a cell in arrays [layers, positions]. */
const cell = (view, layer, position) => layer * view.length + position;

/** The tokens of highest probability somewhere: [text, probability], the highest first. */
function leading(variant, layer, position) {
  const start = cell(variant, layer, position) * page.k;
  return Array.from({ length: page.k }, (_, rank) => {
    const id = variant.ids[start + rank];
    return [token(id), variant.p[start + rank]];
  });
}

/** Visual tokens that cover a part of the picture, of one tile or of all. */
function patches(tile = null) {
  const grid = page.grid;
  if (!page.patches.has(tile)) {
    const all = page.variants[0].positions.map((_, visual) => visual);
    const own = (visual) => grid.row[visual] >= 0 && (tile === null || grid.tile[visual] === tile);
    page.patches.set(tile, grid ? all.filter(own) : all);
  }
  return page.patches.get(tile);
}

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

function label(view, position) {
  const visual = view.visual[position];
  if (visual < 0) return token(view.tokens[position]);
  if (!page.grid) return `visual ${visual}`;
  const { tile, row, column } = page.grid;
  if (row[visual] < 0) return "no patch";
  return (page.tiles.length > 1 ? `${tile[visual]}: ` : "") + `${row[visual]},${column[visual]}`;
}

function place(view, position) {
  const visual = view.visual[position];
  const where = `position ${position}`;
  if (visual < 0) return `${view.roles[position]} token ${token(view.tokens[position])}, ${where}`;
  if (!page.grid || page.grid.row[visual] < 0) return `visual token ${visual}${page.grid ? " without a patch" : ""}, ${where}`;
  const { tile, row, column } = page.grid;
  const part = page.tiles.length > 1 ? `, tile ${tile[visual]}` : "";
  return `patch row ${row[visual]}, column ${column[visual]}${part}, ${where}`;
}
