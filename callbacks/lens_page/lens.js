// The page of one picture. All text from models and data goes through textContent and attributes, never through HTML.
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

// ---------------------------------------------------------------- data

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

// ---------------------------------------------------------------- what is measured

/**
 * A number for every layer and position, and whether it counts; by default where it is the position's largest.
 * `best` is the layer of the largest number at each position; `max` the largest of all patches.
 */
function measured(view, values, counted = null) {
  const best = new Uint16Array(view.length);
  for (let layer = 1; layer < page.layers.length; layer++) {
    for (let p = 0; p < view.length; p++) {
      if (values[cell(view, layer, p)] > values[cell(view, best[p], p)]) best[p] = layer;
    }
  }
  let max = 1e-6;
  for (const visual of patches()) {
    const p = view.positions[visual];
    max = Math.max(max, values[cell(view, best[p], p)]);
  }
  if (!counted) {
    counted = new Uint8Array(values.length);
    for (let p = 0; p < view.length; p++) counted[cell(view, best[p], p)] = 1;
  }
  return { values, counted, best, max };
}

function confidence(variant) {
  const values = new Float32Array(variant.length * page.layers.length);
  for (let i = 0; i < values.length; i++) values[i] = variant.p[i * page.k];
  return measured(variant, values);
}

/** The largest probability of a token that fits; 0 where none is listed. */
function found(variant, fits) {
  const values = new Float32Array(variant.length * page.layers.length);
  const counted = new Uint8Array(values.length);
  for (let i = 0; i < values.length; i++) {
    for (let at = i * page.k; at < (i + 1) * page.k && !counted[i]; at++) {
      if (fits[variant.ids[at]]) { values[i] = variant.p[at]; counted[i] = 1; }
    }
  }
  return measured(variant, values, counted);
}

function matching() {
  const word = folded(state.word);
  const fits = {
    is: (text) => text === word, starts: (text) => text.startsWith(word), contains: (text) => text.includes(word),
  }[state.match];
  page.folded ??= page.tokens.map(folded);
  return page.folded.map(fits);
}

/** Total variation of two lists: a token that one lacks counts as 0 there, the rest of each is one more token. */
function distance(a, b, layer, position) {
  const [fromA, fromB] = [a, b].map((variant) => cell(variant, layer, position) * page.k);
  let listedA = 0, listedB = 0, common = 0;
  for (let i = 0; i < page.k; i++) {
    listedA += a.p[fromA + i];
    listedB += b.p[fromB + i];
    for (let j = 0; j < page.k; j++) {
      if (a.ids[fromA + i] === b.ids[fromB + j]) common += Math.min(a.p[fromA + i], b.p[fromB + j]);
    }
  }
  return (listedA + listedB - 2 * common + Math.abs(listedA - listedB)) / 2;
}

/** Compare two variants up to where their answers part: behind that, positions have nothing in common. */
function compare() {
  const [a, b] = state.pair.map((number) => page.variants[number]);
  const parts = a.tokens.findIndex((token, position) => token !== b.tokens[position]);
  const length = parts < 0 ? a.length : parts;
  Object.assign(difference, { a, b, length, tokens: a.tokens, roles: a.roles, visual: a.visual, positions: a.positions });
  const values = new Float32Array(length * page.layers.length);
  const counted = new Uint8Array(values.length);
  for (let layer = 0; layer < page.layers.length; layer++) {
    for (let p = 0; p < length; p++) {
      const at = cell(difference, layer, p);
      values[at] = distance(a, b, layer, p);
      counted[at] = a.ids[cell(a, layer, p) * page.k] !== b.ids[cell(b, layer, p) * page.k];
    }
  }
  difference.measure = measured(difference, values, counted);
}

function measure() {
  const tokens = state.word ? matching() : null;
  for (const variant of page.variants) {
    variant.confidence ??= confidence(variant);
    variant.measure = tokens ? found(variant, tokens) : variant.confidence;
  }
  if (difference) compare();
}

/** Whether no layer decodes a visual token to a word with at least the threshold's probability. */
function decodesToNothing(view, position) {
  if (view === difference) return [view.a, view.b].every((variant) => decodesToNothing(variant, position));
  page.words ??= page.tokens.map((text) => WORD.test(text));
  view.wordiest ??= Float32Array.from({ length: view.length }, (_, p) => {
    let most = -1;
    for (let layer = 0; layer < page.layers.length; layer++) {
      const at = cell(view, layer, p) * page.k;
      if (page.words[view.ids[at]]) most = Math.max(most, view.p[at]);
    }
    return most;
  });
  return view.wordiest[position] < state.threshold;
}

const layerAt = (view, position) => (state.all ? view.measure.best[position] : state.layer);

/** Whether a patch counts: at the layer that is shown, or at any. */
function counts(view, position) {
  const at = (layer) => view.measure.counted[cell(view, layer, position)];
  return state.all ? page.layers.some((_, layer) => at(layer)) : at(state.layer);
}

/** The first of those for which a function is largest; null of none. */
function strongest(list, value) {
  return list.reduce((best, one) => (best === null || value(one) > value(best) ? one : best), null);
}

// ---------------------------------------------------------------- making elements

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

// ---------------------------------------------------------------- pictures

const INFERNO = ["0,0,4", "40,11,84", "101,21,110", "159,42,99", "212,72,66", "245,125,21", "250,193,39", "252,255,164"]
  .map((stop) => stop.split(",").map(Number));

function heat(share) {
  const at = Math.max(0, Math.min(1, share)) * (INFERNO.length - 1);
  const stop = Math.min(Math.floor(at), INFERNO.length - 2);
  return `rgb(${INFERNO[stop].map((low, i) => Math.round(low + (at - stop) * (INFERNO[stop + 1][i] - low)))})`;
}

/** Left, top, right, bottom of what the patches of a tile cover. */
function extent(tile) {
  const boxes = patches(tile).map((visual) => page.grid.boxes[visual]);
  const ends = (side, end) => end(...boxes.map((box) => box[side]));
  return [ends(0, Math.min), ends(1, Math.min), ends(2, Math.max), ends(3, Math.max)];
}

/** The part of the picture to show: the whole, and what is padded to it; of small tiles theirs only. */
function region() {
  const [width, height] = page.size;
  if (!page.grid || !page.tiles.length) return { seen: [0, 0, width, height], left: 0, top: 0, width, height };
  const seen = extent(state.tile);
  const small = (seen[2] - seen[0]) * (seen[3] - seen[1]) < (width * height) / 2;
  const margin = small ? 0.02 * Math.max(seen[2] - seen[0], seen[3] - seen[1]) : Infinity;
  const [left, top] = [0, 1].map((side) => Math.max(seen[side] - margin, Math.min(seen[side], 0)));
  const [right, bottom] = [2, 3].map((side) => Math.min(seen[side] + margin, Math.max(seen[side], page.size[side - 2])));
  return { seen, left, top, width: right - left, height: bottom - top };
}

function addFigure(view) {
  const figure = { view, root: make("figure"), caption: make("figcaption"), frame: make("div", "picture") };
  figure.canvas = make("canvas");
  figure.cursor = make("div", "cursor");
  figure.legend = make("p", "legend");
  figure.line = make("p", "counts");
  figure.strip = make("ol", "strip");
  figure.frame.tabIndex = 0;
  figure.frame.setAttribute("role", "application");
  figure.frame.setAttribute("aria-label", `Patches, ${view.name}. Arrow keys move, Enter locks.`);
  figure.caption.textContent = view.name;
  figure.frame.append(figure.canvas, figure.cursor);
  for (const name of page.names) {
    const bar = make("li");
    bar.dataset.layer = name;
    bar.append(make("span"));
    figure.strip.append(bar);
  }
  figure.root.append(figure.caption, figure.frame, figure.legend, figure.line, figure.strip);
  $("pictures").append(figure.root);
  figure.frame.addEventListener("pointermove", (event) => hover(view, patchUnder(figure, event)));
  figure.frame.addEventListener("click", (event) => click(view, patchUnder(figure, event)));
  figure.frame.addEventListener("focus", () => look(view));
  figure.strip.addEventListener("click", (event) => {
    const layer = [...figure.strip.children].indexOf(event.target.closest("li"));
    if (layer >= 0) chooseLayer(layer);
  });
  return figure;
}

function patchUnder(figure, event) {
  if (!page.grid) return null;
  const frame = figure.canvas.getBoundingClientRect();
  const x = area.left + ((event.clientX - frame.left) / frame.width) * area.width;
  const y = area.top + ((event.clientY - frame.top) / frame.height) * area.height;
  const under = patches(state.tile).find((visual) => {
    const [left, top, right, bottom] = page.grid.boxes[visual];
    return left <= x && x < right && top <= y && y < bottom;
  });
  return under === undefined ? null : page.variants[0].positions[under];
}

function draw(figure) {
  const { view, canvas } = figure;
  const [width, height] = page.size;
  const scale = (canvas.clientWidth * devicePixelRatio) / area.width;
  canvas.width = Math.round(area.width * scale);
  canvas.height = Math.round(area.height * scale);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, -area.left * scale, -area.top * scale);
  pen.drawImage(picture, 0, 0, width, height);
  if (!page.grid) return;
  if (view === difference || state.word || state.overlay !== "none") {
    pen.globalCompositeOperation = "saturation";
    pen.fillStyle = "gray";
    pen.fillRect(0, 0, width, height);
    pen.globalCompositeOperation = "source-over";
    drawHeat(pen, view);
  }
  if (state.overlay === "tokens") drawTokens(pen, view, scale / devicePixelRatio);
  if (state.masked) drawMask(pen, view);
  drawGrid(pen, scale / devicePixelRatio);
}

function* drawn(view) {
  for (const visual of patches(state.tile)) {
    const position = view.positions[visual];
    const [left, top, right, bottom] = page.grid.boxes[visual];
    yield [position, left, top, right - left, bottom - top];
  }
}

function drawHeat(pen, view) {
  const { values, max } = view.measure;
  const largest = scaleOf(view, max);
  pen.globalAlpha = 0.66;
  for (const [position, ...box] of drawn(view)) {
    pen.fillStyle = heat(values[cell(view, layerAt(view, position), position)] / largest);
    pen.fillRect(...box);
  }
  pen.globalAlpha = 1;
}

/** Variants share one scale, so that their colors can be compared. */
const scaleOf = (view, max) => (view === difference ? max : Math.max(...page.variants.map((one) => one.measure.max)));

function drawTokens(pen, view, scale) {
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  for (const [position, left, top, width, height] of drawn(view)) {
    const variant = view === difference ? view.b : view;
    const text = leading(variant, layerAt(view, position), position)[0][0].replace(/^␣(?=.)/, "");
    pen.fillStyle = "rgb(0 0 0 / 35%)";
    pen.fillRect(left, top, width, height);
    pen.fillStyle = "white";
    pen.font = `${Math.min(0.6 * height, 12 / scale)}px system-ui, sans-serif`;
    // Squeezed a little, then cut.
    const room = Math.floor((1.4 * width * text.length) / pen.measureText(text).width);
    const cut = room < text.length ? `${text.slice(0, room)}…` : text;
    pen.fillText(cut, left + width / 2, top + height / 2, 0.94 * width);
  }
}

function drawMask(pen, view) {
  pen.fillStyle = "black";
  for (const [position, ...box] of drawn(view)) {
    if (decodesToNothing(view, position)) pen.fillRect(...box);
  }
}

/** Lines between patches, and a veil over what the model does not see of the picture. */
function drawGrid(pen, scale) {
  pen.strokeStyle = "rgb(255 255 255 / 22%)";
  pen.lineWidth = 1 / scale;
  for (const [, ...box] of drawn(page.variants[0])) pen.strokeRect(...box);
  const [left, top, right, bottom] = area.seen;
  const veil = new Path2D();
  veil.rect(area.left, area.top, area.width, area.height);
  veil.rect(left, top, right - left, bottom - top);
  pen.fillStyle = "rgb(20 22 26 / 62%)";
  pen.fill(veil, "evenodd");
}

function describe(figure) {
  const { view, legend, line, strip } = figure;
  const own = view.positions.length ? patches(page.grid ? state.tile : null) : [];
  const every = patches();
  const number = (test, visuals) => visuals.filter((visual) => test(view.positions[visual])).length;
  const of = (test) => {
    const here = `${number(test, own)} of ${own.length} patches`;
    return page.tiles.length > 1 ? `${here} (all tiles: ${number(test, every)} of ${every.length})` : here;
  };
  const where = state.all ? "at any layer" : `at ${page.names[state.layer]}`;
  const parts = [];
  if (view === difference) parts.push(`another token ${where}: ${of((p) => counts(view, p))}`);
  else if (state.word) parts.push(`“${state.word}” ${where}: ${of((p) => counts(view, p))}`);
  if (state.masked) parts.push(`decode to nothing: ${of((p) => decodesToNothing(view, p))}`);
  const name = view === difference ? "distance" : state.word ? `probability of “${state.word}”` : "top-1 probability";
  const unit = (value) => (view === difference ? Number(value.toPrecision(2)) : `${percent(value)} %`);
  legend.replaceChildren(make("span", "", `${name}  0`), make("span", "ramp"), make("span", "", unit(scaleOf(view, view.measure.max))));
  legend.hidden = state.overlay === "none" && !state.word && view !== difference;
  const perLayer = page.layers.map((_, layer) => number((p) => view.measure.counted[cell(view, layer, p)], own));
  const what = view === difference ? "another token" : state.word ? `“${state.word}”` : "most confident here";
  line.textContent = [...parts, `bars: patches by layer, ${what}`].join(" · ");
  const most = Math.max(1, ...perLayer);
  strip.setAttribute("aria-label", `Patches per layer, ${what}`);
  perLayer.forEach((count, layer) => {
    const bar = strip.children[layer];
    bar.title = `${page.names[layer]}: ${count} patches (${what})`;
    bar.dataset.count = count;
    bar.firstChild.style.height = `${(100 * count) / most}%`;
    bar.classList.toggle("chosen", !state.all && layer === state.layer);
  });
}

function drawPictures() {
  area = region();
  const side = Number($("side").value);
  for (const { frame } of figures) {
    frame.style.aspectRatio = `${area.width} / ${area.height}`;
    frame.style.width = `${side * Math.min(1, area.width / area.height)}px`;
  }
  for (const figure of figures) describe(figure);
  for (const figure of figures) draw(figure);
  for (const button of $("tiles").children) button.setAttribute("aria-pressed", Number(button.dataset.tile) === state.tile);
  if (difference) listDifferences();
  placeCursor();
}

function listDifferences() {
  const { a, b, measure: { values, counted } } = difference;
  const layers = state.all ? page.layers.map((_, layer) => layer) : [state.layer];
  const rows = patches(page.grid ? state.tile : null).map((visual) => {
    const position = difference.positions[visual];
    const far = (layer) => values[cell(difference, layer, position)];
    const differing = layers.filter((layer) => counted[cell(difference, layer, position)]);
    const layer = strongest(differing, far);
    return layer === null ? null : { position, layer, far: far(layer) };
  }).filter((row) => row).sort((one, other) => other.far - one.far);
  $("differing").textContent = `Patches with another token: ${rows.length}`;
  $("differences").replaceChildren(...rows.map(({ position, layer, far }) => {
    const button = make("button");
    const [from, to] = [a, b].map((variant) => leading(variant, layer, position)[0]);
    button.append(
      make("span", "soft", `${label(difference, position)} · ${page.names[layer]}`),
      make("span", "token", `${from[0]} → ${to[0]}`), make("span", "soft", far.toFixed(3)),
    );
    button.addEventListener("click", () => { state.locked = true; look(difference, position, layer); });
    const item = make("li");
    item.append(button);
    return item;
  }));
}

function placeCursor() {
  const visual = state.view.visual[state.position];
  const shown = page.grid && visual >= 0 && page.grid.row[visual] >= 0 && page.grid.tile[visual] === state.tile;
  for (const { cursor, root, view } of figures) {
    root.classList.toggle("viewed", view === state.view);
    cursor.hidden = !shown;
    if (!shown) continue;
    const [left, top, right, bottom] = page.grid.boxes[visual];
    const share = (value, whole) => `${(100 * value) / whole}%`;
    Object.assign(cursor.style, {
      left: share(left - area.left, area.width), top: share(top - area.top, area.height),
      width: share(right - left, area.width), height: share(bottom - top, area.height),
    });
  }
}

// ---------------------------------------------------------------- panel

function buildPanel() {
  const columns = state.view === difference
    ? [difference.a.name, difference.b.name, "distance"]
    : Array.from({ length: page.k }, (_, rank) => `${rank + 1}`);
  const head = make("tr");
  head.append(...["layer", ...columns].map((text) => Object.assign(make("th", "", text), { scope: "col" })));
  const rows = page.names.map((name) => {
    const row = make("tr");
    row.append(Object.assign(make("th", "", name), { scope: "row" }));
    for (const _ of columns) {
      const entry = make("td");
      entry.append(make("span", "token"), make("span", "chance"));
      row.append(entry);
    }
    return row;
  });
  $("layers").replaceChildren(make("thead"), make("tbody"));
  $("layers").tHead.append(head);
  $("layers").tBodies[0].append(...rows);
  panel = { view: state.view, pair: state.pair.join(), rows };
}

function fillPanel() {
  const { view, position, pointed } = state;
  if (panel?.view !== view || panel.pair !== state.pair.join()) buildPanel();
  const best = view === difference ? view.measure.best[position] : view.confidence.best[position];
  panel.rows.forEach((row, layer) => {
    row.classList.toggle("best", layer === best);
    row.classList.toggle("chosen", !state.all && layer === state.layer);
    row.classList.toggle("pointed", layer === pointed);
    entries(view, layer, position).forEach(([text, p], number) => {
      const [name, chance] = row.children[number + 1].children;
      name.textContent = text;
      chance.textContent = text ? percent(p) : p.toFixed(3);
      row.children[number + 1].title = text ? `${text} ${percent(p)} %` : "";
      row.children[number + 1].style.setProperty("--p", p);
    });
  });
  $("place").textContent = place(view, position);
  const [[text, p]] = entries(view, best, position);
  $("best").textContent = view === difference
    ? `furthest apart: ${page.names[best]}, ${view.measure.values[cell(view, best, position)].toFixed(3)}`
    : `most confident: ${page.names[best]}, ${text} ${percent(p)} %`;
  $("viewed").textContent = view.name;
  $("lock").textContent = state.locked ? "locked: click again or Esc releases" : "click or Enter locks";
  document.body.classList.toggle("locked", state.locked);
}

function entries(view, layer, position) {
  if (view !== difference) return leading(view, layer, position);
  const pair = [view.a, view.b].map((variant) => leading(variant, layer, position)[0]);
  return [...pair, ["", view.measure.values[cell(view, layer, position)]]];
}

// ---------------------------------------------------------------- table

const table = { window: "" };

/** Only cells in sight exist; they are made anew when the window moves by a cell. */
function drawTable(anew = true) {
  const box = $("table");
  const { view } = state;
  const range = (from, size, cellSize, count) =>
    [Math.max(0, Math.floor(from / cellSize) - 2), Math.min(count, Math.ceil((from + size) / cellSize) + 2)];
  const [first, last] = range(box.scrollLeft, box.clientWidth, CELL.width, view.length);
  const [above, below] = range(box.scrollTop, box.clientHeight, CELL.height, page.layers.length);
  const shown = [first, last, above, below].join();
  if (!anew && table.window === shown) return;
  table.window = shown;
  const sheet = $("sheet");
  const width = CELL.name + view.length * CELL.width;
  sheet.style.width = `${width}px`;
  sheet.style.height = `${CELL.head + page.layers.length * CELL.height}px`;
  box.setAttribute("aria-rowcount", page.layers.length + 1);
  box.setAttribute("aria-colcount", view.length + 1);
  const head = tableRow("head", 0, "layer", first, last, (position) => {
    const name = make("span", `position ${view.visual[position] < 0 ? "token" : ""}`, label(view, position));
    name.title = place(view, position);
    name.setAttribute("role", "columnheader");
    return name;
  });
  const rows = [];
  for (let layer = above; layer < below; layer++) {
    const row = tableRow("", CELL.head + layer * CELL.height, page.names[layer], first, last, (position) => tableCell(view, layer, position));
    row.setAttribute("aria-rowindex", layer + 2);
    row.classList.toggle("chosen", !state.all && layer === state.layer);
    rows.push(row);
  }
  table.column ??= make("div", "column");
  sheet.replaceChildren(...rows, head, table.column);
  markColumn();
}

function tableRow(className, top, name, first, last, makeCell) {
  const row = make("div", `row ${className}`);
  row.setAttribute("role", "row");
  row.style.top = `${top}px`;
  const heading = make("span", "name", name);
  heading.setAttribute("role", className ? "columnheader" : "rowheader");
  row.append(heading);
  for (let position = first; position < last; position++) {
    const entry = makeCell(position);
    entry.style.left = `${CELL.name + position * CELL.width}px`;
    entry.setAttribute("aria-colindex", position + 2);
    row.append(entry);
  }
  return row;
}

function tableCell(view, layer, position) {
  const listed = entries(view, layer, position);
  const [[text, p], [other]] = view === difference ? listed : [listed[0], [""]];
  const entry = make("span", "cell token", view === difference && other !== text ? `${text} → ${other}` : text);
  const value = view === difference ? listed[2][1] : p;
  entry.style.setProperty("--p", value);
  entry.title = `${page.names[layer]}, ${label(view, position)}: ${entry.textContent} ${view === difference ? value.toFixed(3) : `${percent(value)} %`}`;
  if (state.word && view !== difference) entry.classList.toggle("hit", view.measure.counted[cell(view, layer, position)] > 0);
  entry.setAttribute("role", "gridcell");
  return entry;
}

function markColumn() {
  const style = table.column.style;
  style.left = `${CELL.name + state.position * CELL.width}px`;
  style.width = `${CELL.width}px`;
  table.column.hidden = state.position >= state.view.length;
}

function scrollTable() {
  const box = $("table");
  const left = state.position * CELL.width;
  const room = box.clientWidth - CELL.name;
  if (left < box.scrollLeft) box.scrollLeft = left;
  if (left + CELL.width > box.scrollLeft + room) box.scrollLeft = left + CELL.width - room;
  if (state.pointed === null) return;
  const top = state.pointed * CELL.height;
  const height = box.clientHeight - CELL.head;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + CELL.height > box.scrollTop + height) box.scrollTop = top + CELL.height - height;
}

function cellUnder(event) {
  const box = $("table");
  const frame = box.getBoundingClientRect();
  const x = event.clientX - frame.left - box.clientLeft - CELL.name;
  const y = event.clientY - frame.top - box.clientTop - CELL.head;
  if (x < 0 || event.clientX - frame.left > box.clientWidth || event.clientY - frame.top > box.clientHeight) return [null, null];
  const position = Math.floor((x + box.scrollLeft) / CELL.width);
  const layer = y < 0 ? null : Math.floor((y + box.scrollTop) / CELL.height);
  return [position < state.view.length ? position : null, layer !== null && layer < page.layers.length ? layer : null];
}

// ---------------------------------------------------------------- looking

/** Show a position as one of the views; `pointed` is the layer under the pointer, if any. */
function look(view, position = state.position, pointed = null) {
  const turned = view !== state.view;
  state.view = view;
  state.position = Math.min(position, view.length - 1);
  state.pointed = pointed;
  const visual = view.visual[state.position];
  if (page.grid && visual >= 0 && page.grid.row[visual] >= 0 && page.grid.tile[visual] !== state.tile) {
    chooseTile(page.grid.tile[visual]);
  }
  placeCursor();
  fillPanel();
  if (turned) {
    for (const [number, button] of [...$("views").children].entries()) button.setAttribute("aria-pressed", views[number] === view);
    drawTable();
  }
  markColumn();
  scrollTable();
}

function hover(view, position, layer = null) {
  if (state.locked || position === null) return;
  if (view !== state.view || position !== state.position || layer !== state.pointed) look(view, position, layer);
}

function click(view, position, layer = null) {
  if (position === null) return;
  state.locked = !state.locked;
  look(state.locked ? view : state.view, state.locked ? position : state.position, layer);
  if (!state.locked) hover(view, position, layer);
}

function release() {
  state.locked = false;
  fillPanel();
}

function movePatch(down, across) {
  if (!page.grid || state.locked) return;
  const { tile, row, column } = page.grid;
  const from = state.view.visual[state.position];
  const own = patches(state.tile);
  if (!own.length) return;
  if (from < 0 || row[from] < 0 || tile[from] !== state.tile) {
    look(state.view, state.view.positions[own[0]]);
    return;
  }
  // The nearest in that direction: rows may have gaps, and differ in length.
  const ahead = own.filter((one) => (row[one] - row[from]) * down + (column[one] - column[from]) * across > 0);
  const far = (one) => {
    const [rows, columns] = [Math.abs(row[one] - row[from]), Math.abs(column[one] - column[from])];
    return down ? rows + 1000 * columns : columns + 1000 * rows;
  };
  const next = strongest(ahead, (one) => -far(one));
  if (next !== null) look(state.view, state.view.positions[next]);
}

function moveCell(down, across) {
  if (state.locked) return;
  const bound = (value, count) => Math.max(0, Math.min(count - 1, value));
  const layer = bound((state.pointed ?? layerAt(state.view, state.position)) + down, page.layers.length);
  look(state.view, bound(state.position + across, state.view.length), layer);
}

// ---------------------------------------------------------------- controls

function redraw() {
  $("layer").value = state.layer;
  $("layer-name").textContent = state.all ? "each patch’s strongest" : page.names[state.layer];
  $("all").checked = state.all;
  drawPictures();
  fillPanel();
  drawTable();
}

function chooseLayer(layer) {
  state.layer = Math.max(0, Math.min(page.layers.length - 1, layer));
  state.all = false;
  redraw();
}

function chooseTile(tile) {
  state.tile = tile;
  drawPictures();
}

/** A button for each tile, with a map of where it is in the picture. */
function addTiles() {
  const [width, height] = page.size;
  for (const tile of page.tiles) {
    const [left, top, right, bottom] = extent(tile);
    const button = make("button");
    const map = make("span", "map");
    const part = make("span");
    map.style.aspectRatio = `${width} / ${height}`;
    const share = (value, whole) => `${Math.max(0, Math.min(100, (100 * value) / whole))}%`;
    Object.assign(part.style, {
      left: share(left, width), top: share(top, height), right: share(width - right, width), bottom: share(height - bottom, height),
    });
    map.append(part);
    button.dataset.tile = tile;
    button.title = `tile ${tile}: ${patches(tile).length} patches`;
    button.append(map, document.createTextNode(` ${tile}`));
    button.addEventListener("click", () => chooseTile(tile));
    $("tiles").append(button);
  }
  $("tile-group").hidden = page.tiles.length < 2;
}

function addViews() {
  for (const view of views) {
    const button = make("button", "", view.name);
    button.addEventListener("click", () => look(view));
    $("views").append(button);
  }
  $("view-group").hidden = views.length < 2;
  if (!difference) return;
  for (const [which, id] of ["from", "to"].entries()) {
    $(id).append(...page.variants.map((variant, number) => new Option(variant.name, number)));
    $(id).value = state.pair[which];
    $(id).addEventListener("change", () => {
      state.pair[which] = Number($(id).value);
      measure();
      look(state.view);
      redraw();
    });
  }
}

function listen() {
  const on = (id, event, act) => $(id).addEventListener(event, () => act($(id)));
  const remeasured = () => { measure(); redraw(); };
  on("layer", "input", (input) => chooseLayer(Number(input.value)));
  on("all", "change", (input) => { state.all = input.checked; redraw(); });
  on("overlay", "change", (input) => { state.overlay = input.value; redraw(); });
  on("word", "input", (input) => { state.word = folded(input.value); remeasured(); });
  on("match", "change", (input) => { state.match = input.value; remeasured(); });
  on("masked", "change", (input) => { state.masked = input.checked; redraw(); });
  on("threshold", "input", (input) => {
    state.threshold = Number(input.value);
    $("threshold-value").textContent = `${Math.round(100 * state.threshold)} %`;
    redraw();
  });
  on("side", "input", drawPictures);
  on("help-button", "click", () => $("help").showModal());
  on("help-close", "click", () => $("help").close());
  $("table").addEventListener("scroll", () => drawTable(false));
  $("table").addEventListener("pointermove", (event) => hover(state.view, ...cellUnder(event)));
  $("table").addEventListener("click", (event) => click(state.view, ...cellUnder(event)));
  document.addEventListener("keydown", press);
  let width = document.body.clientWidth;
  addEventListener("resize", () => {
    if (document.body.clientWidth !== width) drawPictures();
    width = document.body.clientWidth;
    drawTable(false);
  });
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

const KEYS = {
  "/": () => $("word").focus(),
  "?": () => $("help").showModal(),
  a: () => $("all").click(),
  j: () => chooseLayer(state.layer + 1),
  k: () => chooseLayer(state.layer - 1),
  m: () => $("masked").click(),
  t: () => page.tiles.length && chooseTile(page.tiles[(page.tiles.indexOf(state.tile) + 1) % page.tiles.length]),
  v: () => look(views[(views.indexOf(state.view) + 1) % views.length]),
};

function press(event) {
  const { key, target } = event;
  if ($("help").open || event.ctrlKey || event.metaKey || event.altKey) return;
  const frame = target.closest(".picture");
  const inTable = target === $("table");
  if (key === "Escape") {
    if (frame || inTable) release();
    else figures[0].frame.focus();
  } else if (target.matches("input[type=search], select")) {
    return;
  } else if (key in ARROWS && (frame || inTable)) {
    (frame ? movePatch : moveCell)(...ARROWS[key]);
  } else if ((key === "Enter" || key === " ") && (frame || inTable)) {
    click(state.view, state.position, state.pointed);
  } else if (key in KEYS) {
    KEYS[key]();
  } else {
    return;
  }
  event.preventDefault();
}

// ---------------------------------------------------------------- start

async function start() {
  await load();
  page.tiles = page.grid ? [...new Set(page.grid.tile)].filter((tile) => tile >= 0).sort((a, b) => a - b) : [];
  state.tile = page.tiles[0] ?? 0;
  state.layer = page.layers.length - 1;
  views = [...page.variants];
  if (views.length > 1) views.push(difference = { name: "difference" });
  measure();
  $("layer").max = page.layers.length - 1;
  // Two fit beside each other, with the scroll bar that they will bring.
  $("side").value = views.length > 1 ? Math.max(240, ($("pictures").clientWidth - 48) / 2) : 620;
  addViews();
  addTiles();
  figures = views.map(addFigure);
  listen();
  // Something to see at once: the patch that the first model is surest of.
  const [first] = views;
  const sure = (visual) => first.measure.values[cell(first, first.measure.best[first.positions[visual]], first.positions[visual])];
  const surest = strongest(patches(page.grid ? state.tile : null), sure);
  area = region();
  look(first, surest === null ? first.length - 1 : first.positions[surest]);
  redraw();
  figures[0].frame.focus({ preventScroll: true, focusVisible: false });
  document.documentElement.dataset.ready = performance.now();
}

start().catch((error) => {
  $("failure").textContent = `This page cannot be shown: ${error.message}. It needs a browser of 2023 or newer.`;
  $("failure").hidden = false;
  throw error;
});
