// Shows the entries that have every word of the filter; / leads to it, arrow keys move between entries.
"use strict";

const filter = document.getElementById("filter");
const entries = [...document.getElementById("entries").children];
const texts = entries.map((entry) => entry.textContent.toLowerCase());

filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/);
  entries.forEach((entry, number) => { entry.hidden = !words.every((word) => texts[number].includes(word)); });
  document.getElementById("shown").textContent = `${entries.filter((entry) => !entry.hidden).length} of ${entries.length}`;
});

document.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "/" && event.target !== filter) {
    filter.focus();
  } else if (step) {
    const stops = [filter, ...entries.filter((entry) => !entry.hidden).map((entry) => entry.firstElementChild)];
    stops[Math.max(0, Math.min(stops.length - 1, stops.indexOf(document.activeElement) + step))].focus();
  } else {
    return;
  }
  event.preventDefault();
});

document.documentElement.dataset.ready = performance.now();
