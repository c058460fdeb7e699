// What is looked at, how it is chosen, and the start.

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
