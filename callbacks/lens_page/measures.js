// What is measured of the models' tokens: confidence, a word that is searched for, the difference of two models.

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
