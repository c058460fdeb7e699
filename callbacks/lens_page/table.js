// The panel of one position, and the table of all.

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
