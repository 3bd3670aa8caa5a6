// The playground's page: what the reader draws and switches, and what four maps make of it.
"use strict";

(() => {
  const { SIDE } = engine;
  const DRAWS = 5;
  const METHODS = { ...playgroundData.titles };
  METHODS.sobel += " (no network)";
  const QUIET = 700; // milliseconds without a change before the text is written anew
  const form = document.getElementById("playground");
  const part = (name) => form.querySelector(`[data-part="${name}"]`);
  const paper = part("paper");
  const sets = {}; // the data of each set and what follows from it, once loaded

  let strokes = []; // lists of points [x, y] on a paper of 28 x 28
  let sample = 0; // which sample is shown, or null for the reader's drawing
  let roll = 0; // how often the reader has re-rolled

  // ---------------------------------------------------------------- small helpers

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const bitmap = (label) => {
    const canvas = element("canvas", { width: SIDE, height: SIDE });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    return canvas;
  };
  const short = (digits) => digits.replace(/^(-?)0\./, "$1.").replace("-", "−"); // −.25 rather than -0.25
  const number = (value) => (Number.isNaN(value) ? "undefined" : short(value.toFixed(2)));
  const sizeOf = (map) => short(engine.largest(map).toPrecision(2));
  const percent = (share) => `${Math.round(100 * share)}\u00a0%`;
  const defined = (values) => values.filter((value) => !Number.isNaN(value));
  const mean = (values) => defined(values).reduce((sum, value) => sum + value, 0) / defined(values).length;
  const range = (values) => {
    if (!defined(values).length) return "undefined";
    const [low, high] = [Math.min(...defined(values)), Math.max(...defined(values))].map(number);
    return low === high ? low : `${low} to ${high}`;
  };
  const setName = () => form.elements.set.value;
  const chosenLayers = () => [...form.elements.random].filter((box) => box.checked).map((box) => box.value);

  // ---------------------------------------------------------------- pictures

  function paint(canvas, colour) {
    const pixels = new ImageData(SIDE, SIDE);
    for (let i = 0; i < SIDE ** 2; i++) pixels.data.set([...colour(i), 255], 4 * i);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  const paintImage = (canvas, image) => paint(canvas, (i) => Array(3).fill(Math.round(255 * image[i])));

  /** Orange above zero, purple below; full colour at the 99 % quantile of |values|, as in the book's figures. */
  function paintMap(canvas, map) {
    const sizes = map.map(Math.abs).sort();
    const place = 0.99 * (sizes.length - 1);
    const low = sizes[Math.floor(place)];
    const limit = low + (place % 1) * (sizes[Math.ceil(place)] - low) || sizes.at(-1) || 1;
    const colours = engine.bytes(playgroundData.colours);
    paint(canvas, (i) => {
      const at = Math.min(255, Math.max(0, Math.floor(128 * (1 + map[i] / limit))));
      return colours.subarray(3 * at, 3 * at + 3);
    });
  }

  function paintPaper(image) {
    const context = paper.getContext("2d");
    const scale = paper.width / SIDE;
    context.fillStyle = "black";
    context.fillRect(0, 0, paper.width, paper.height);
    if (sample !== null) {
      const small = element("canvas", { width: SIDE, height: SIDE });
      paintImage(small, image);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, 0, 0, paper.width, paper.height);
      return;
    }
    Object.assign(context, { strokeStyle: "white", lineWidth: sets.digits.pen * scale, lineCap: "round", lineJoin: "round" });
    for (const stroke of strokes) {
      context.beginPath();
      context.moveTo(stroke[0][0] * scale + 0.1, stroke[0][1] * scale); // a tap, too, is a line
      stroke.forEach(([x, y]) => context.lineTo(x * scale, y * scale));
      context.stroke();
    }
  }

  // ---------------------------------------------------------------- the table of maps

  const cells = {}; // method -> one cell for the trained network and one for each draw

  function buildTable() {
    const heads = ["Trained", ...Array.from({ length: DRAWS }, (_, i) => `Draw ${i + 1}`)].map((name) =>
      element("th", { scope: "col" }, name, element("span", { className: "sees" })),
    );
    const table = part("maps");
    table.append(element("thead", {}, element("tr", {}, ...heads)));
    for (const [method, name] of Object.entries(METHODS)) {
      cells[method] = heads.map(() =>
        element("td", {}, bitmap(""), element("span", { className: "dead" }), element("span", { className: "similarity" }), element("span", { className: "size" })),
      );
      const gauge = element("div", { className: "gauge" });
      gauge.setAttribute("aria-hidden", "true"); // the line of text beside it says the same
      const title = element("th", { scope: "rowgroup", colSpan: 1 + DRAWS }, element("strong", {}, name), element("span", { className: "lines" }), gauge);
      table.append(element("tbody", {}, element("tr", {}, title), element("tr", {}, ...cells[method])));
    }
  }

  function showMap(method, column, map, similarity) {
    const cell = cells[method][column];
    const alive = engine.largest(map) > 0;
    const network = column ? `draw ${column}` : "trained network";
    const what = alive ? `largest ${sizeOf(map)}` : "no signal";
    paintMap(cell.querySelector("canvas"), map);
    cell.querySelector("canvas").setAttribute("aria-label", `${METHODS[method]}, ${network}: ${what}`);
    cell.querySelector(".dead").textContent = alive ? "" : "no signal";
    cell.querySelector(".size").textContent = alive ? `max ${sizeOf(map)}` : "max 0";
    cell.querySelector(".similarity").textContent = column ? number(similarity) : "";
  }

  function showLines(method, { draws, others, twin }) {
    const group = cells[method][0].closest("tbody");
    const words = [`draws ${range(draws)}`, `other drawings ${number(mean(others))}`, `twin ${number(twin)}`];
    group.querySelector(".lines").textContent = words.join(" · ");
    const left = (value) => `${(100 * (Math.min(1, Math.max(-0.5, value)) + 0.5)) / 1.5}%`;
    const mark = (className, value) => {
      const made = element("i", { className });
      made.style.left = left(value);
      return made;
    };
    const kinds = Object.entries({ zero: [0], other: others, twin: [twin], draw: draws });
    const marks = kinds.flatMap(([kind, values]) => defined(values).map((value) => mark(kind, value)));
    group.querySelector(".gauge").replaceChildren(...marks);
  }

  // ---------------------------------------------------------------- probabilities

  function showProbabilities(classes, trained, draws) {
    const bars = classes.map((name, i) => {
      const bar = element("span", { className: "bar" }, element("b"));
      bar.firstChild.style.width = `${100 * trained[i]}%`;
      for (const draw of draws) {
        const mark = element("i", { className: "draw" });
        mark.style.left = `${100 * draw[i]}%`;
        bar.append(mark);
      }
      return element("li", {}, element("span", {}, name), bar, element("span", {}, percent(trained[i])));
    });
    part("probabilities").replaceChildren(...bars);
  }

  // ---------------------------------------------------------------- from the drawing to the maps

  /** The reader's network: trained, but for the chosen layers of one draw. A layer's draw depends on nothing else. */
  function randomised(set, layers, draw) {
    const net = { ...set.trained };
    for (const name of layers) {
      const place = engine.LAYERS.findIndex((spec) => spec.name === name);
      const seed = (roll * DRAWS + draw) * engine.LAYERS.length + place;
      net[name] = set.drawn[seed] ??= engine.randomLayer(name, seed);
    }
    return net;
  }

  /** Everything about one network and one image: probabilities, the class explained, maps and their ranks. */
  function explain(net, image, locked) {
    const pass = engine.forward(net, image);
    const seen = engine.argmax(pass.logits);
    const target = locked ?? seen;
    const maps = engine.maps(net, image, pass, target);
    const signed = form.elements.signs.value === "signed";
    const ranks = {};
    for (const [method, map] of Object.entries(maps)) ranks[method] = engine.unitRanks(signed ? map : map.map(Math.abs));
    return { net, logits: pass.logits, probabilities: engine.softmax(pass.logits), seen, target, maps, ranks };
  }

  const similarity = (method, a, b) => engine.correlation(a.ranks[method], b.ranks[method]);

  /** The trained network's maps of the other samples: what a similarity is worth. */
  function otherDrawings(set) {
    const kind = form.elements.signs.value;
    set.others[kind] ??= set.samples.map((image) => explain(set.trained, image));
    return set.others[kind].filter((_, i) => i !== sample);
  }

  const pause = () => new Promise((resume) => setTimeout(resume));

  async function update() {
    const set = await loaded(setName());
    const image = sample === null ? engine.normalise(strokes, set.pen) : set.samples[sample];
    const layers = chosenLayers();
    paintPaper(image);
    paintImage(part("input"), image);
    const trained = explain(set.trained, image);
    const results = [trained];
    const show = (column) => {
      const { seen, probabilities, maps } = results[column];
      const head = part("maps").querySelectorAll("thead .sees")[column];
      head.textContent = `${set.classes[seen]} ${percent(probabilities[seen])}`;
      for (const method of Object.keys(METHODS)) showMap(method, column, maps[method], similarity(method, trained, results[column]));
    };
    show(0);
    for (let draw = 0; draw < DRAWS; draw++) {
      await pause();
      const locked = form.elements.locked.checked ? trained.seen : undefined;
      results.push(layers.length ? explain(randomised(set, layers, draw), image, locked) : trained);
      show(draw + 1);
    }
    const twin = explain(set.twin, image, trained.seen);
    const others = otherDrawings(set);
    const lines = {};
    for (const method of Object.keys(METHODS)) {
      lines[method] = {
        draws: results.slice(1).map((result) => similarity(method, trained, result)),
        others: others.map((other) => similarity(method, trained, other)),
        twin: similarity(method, trained, twin),
      };
      showLines(method, lines[method]);
    }
    showProbabilities(set.classes, trained.probabilities, layers.length ? results.slice(1).map((r) => r.probabilities) : []);
    const distance = engine.distance(image, set.training);
    part("unlike").textContent = unlike(set, image, distance);
    form.shown = { image, distance, results, twin, lines }; // the numbers behind the page, for consoles and tests
    describeSoon(() => describe(set, layers, results, lines));
  }

  function unlike(set, image, distance) {
    const [low, high] = set.training.limits;
    if (!engine.largest(image)) return "The paper is blank: unlike the training data.";
    if (low <= distance && distance <= high) return "";
    return `Unlike the training data: its distance from their mean is ${number(distance)}, and most have ${range([low, high])}.`;
  }

  // ---------------------------------------------------------------- the same in words

  function describe(set, layers, results, lines) {
    const [trained, ...draws] = results;
    const says = ({ seen, probabilities }) => `${set.classes[seen]} (${percent(probabilities[seen])})`;
    const sentences = [`The trained network sees: ${says(trained)}.`, part("unlike").textContent];
    sentences.push(layers.length ? `Random: ${layers.join(", ")}. The five draws see: ${draws.map(says).join(", ")}.` : "No layer is random.");
    sentences.push(
      form.elements.locked.checked
        ? `The class explained is locked: ${set.classes[trained.seen]}.`
        : "Explained is each network's own first choice.",
    );
    for (const [method, name] of Object.entries(METHODS)) {
      const { draws: values, others } = lines[method];
      const dead = results.filter(({ maps }) => !engine.largest(maps[method])).length;
      const silent = dead ? `, no signal in ${dead} of ${results.length} maps` : "";
      sentences.push(`${name}: similarity to the trained map ${range(values)}, other drawings ${number(mean(others))}${silent}.`);
    }
    part("words").textContent = sentences.filter(Boolean).join(" ");
  }

  let waiting;
  function describeSoon(write) {
    clearTimeout(waiting);
    waiting = setTimeout(write, QUIET);
  }

  // ---------------------------------------------------------------- what the reader does

  let running = false;
  let changed = false;

  /** Bring everything up to date; changes that come meanwhile are seen to in one further round. */
  async function refresh() {
    changed = true;
    if (running) return;
    running = true;
    form.setAttribute("aria-busy", "true");
    while (changed) {
      changed = false;
      await update();
      await pause();
    }
    running = false;
    form.setAttribute("aria-busy", "false");
  }

  /** The data of a set, by a script: unlike `fetch`, that also works for pages opened from a folder. */
  async function loaded(name) {
    if (sets[name]) return sets[name];
    await new Promise((resolve, reject) => {
      const script = element("script", { src: form.dataset.folder + name + ".js", onload: resolve, onerror: reject });
      document.head.append(script);
    });
    const { classes, labels, samples, weights, pen, training } = playgroundData[name];
    sets[name] = {
      classes,
      labels,
      pen,
      samples: engine.images(samples),
      trained: engine.network(engine.halves(weights.trained)),
      twin: engine.network(engine.halves(weights.twin)),
      training: { ...training, mean: engine.halves(training.mean), components: engine.halves(training.components) },
      others: {},
      drawn: {},
    };
    return sets[name];
  }

  function pick(index) {
    sample = index;
    strokes = [];
    part("samples").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", i === index));
    refresh();
  }

  async function changeSet() {
    const set = await loaded(setName());
    const buttons = set.samples.map((image, i) => {
      const picture = element("canvas", { width: SIDE, height: SIDE });
      paintImage(picture, image);
      const button = element("button", { type: "button", title: set.classes[set.labels[i]], onclick: () => pick(i) }, picture);
      button.setAttribute("aria-label", `sample ${i + 1}: ${set.classes[set.labels[i]]}`);
      return button;
    });
    part("samples").replaceChildren(...buttons);
    form.dataset.set = setName();
    part("clear").disabled = setName() !== "digits";
    pick(0);
  }

  function draw(event) {
    if (setName() !== "digits" || !event.isPrimary || event.button > 0) return;
    const point = ({ clientX, clientY }) => {
      const box = paper.getBoundingClientRect();
      return [(SIDE * (clientX - box.left)) / box.width, (SIDE * (clientY - box.top)) / box.height];
    };
    if (sample !== null) pick(null);
    const stroke = [point(event)];
    strokes.push(stroke);
    paper.setPointerCapture(event.pointerId);
    paper.onpointermove = (next) => {
      const [[x, y], [u, v]] = [point(next), stroke.at(-1)];
      if ((x - u) ** 2 + (y - v) ** 2 < 0.1) return;
      stroke.push([x, y]);
      paintPaper();
      refresh();
    };
    paper.onpointerup = paper.onpointercancel = () => (paper.onpointermove = null);
    refresh();
  }

  function reroll() {
    roll += 1;
    for (const set of Object.values(sets)) set.drawn = {};
    refresh();
  }

  function reset() {
    for (const box of form.elements.random) box.checked = false;
    refresh();
  }

  buildTable();
  paper.addEventListener("pointerdown", draw);
  part("clear").addEventListener("click", () => pick(null));
  part("reroll").addEventListener("click", reroll);
  part("train").addEventListener("click", reset);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", (event) => (event.target.name === "set" ? changeSet() : refresh()));
  document.getElementById("playground-still").hidden = true;
  form.hidden = false;
  changeSet();
})();
