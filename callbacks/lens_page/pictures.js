// The pictures with their patches.

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
