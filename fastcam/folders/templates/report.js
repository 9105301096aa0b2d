"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const by = (id) => document.getElementById(id);
const made = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const percent = (share) => `${(100 * share).toFixed(1)} %`;
// A model that ends in raw scores has no probabilities.
const hasProbability = ({ probability }) => typeof probability === "number";
const strength = (described) => (hasProbability(described) ? percent(described.probability) : described.score.toPrecision(3));
const sortKey = (described) => (hasProbability(described) ? described.probability : described.score);
// A detector may find nothing in a picture.
const NOTHING = { index: -1, label: "nothing found", probability: 0, score: 0 };
const images = DATA.images.map((image, order) => ({ ...image, order, rank: 0, best: image.top[0] ?? NOTHING }));
// Boxes have numbers of their own: they are grouped by class.
const HAS_BOXES = images.some(({ classes }) => classes.some(({ box }) => box));
const key = ({ index, label }) => (HAS_BOXES ? label : String(index));
let visible = images;

// Heatmaps: the small map is enlarged as the overlays are (half-pixel centres, edges repeated), then coloured. Pixels of
// the photo are never read, so the page also works from disk.
const HEATMAP_SIDE = 240;

function sampled(length, from) {
  return Array.from({ length }, (_, i) => {
    const position = Math.min(Math.max(((i + 0.5) * from) / length - 0.5, 0), from - 1);
    const low = Math.floor(position);
    return [low, Math.min(low + 1, from - 1), position - low];
  });
}

function drawHeatmap(canvas, image) {
  const described = image.classes[image.rank];
  // A blank map has nothing to show, and its caption says so; the box of a detector is shown in any case.
  canvas.hidden = !described || (described.evidence === 0 && !described.box);
  if (canvas.hidden) return;
  const [rows, columns] = image.map_size;
  const map = Uint8Array.from(atob(described.map), (letter) => letter.charCodeAt(0));
  const [height, width] = image.image_size;
  const scale = HEATMAP_SIDE / Math.max(height, width);
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  const across = sampled(canvas.width, columns);
  let at = 0;
  for (const [top, bottom, down] of sampled(canvas.height, rows)) {
    for (const [left, right, along] of across) {
      const above = map[top * columns + left] * (1 - along) + map[top * columns + right] * along;
      const below = map[bottom * columns + left] * (1 - along) + map[bottom * columns + right] * along;
      const colour = 3 * Math.round(above * (1 - down) + below * down);
      pixels.data[at++] = DATA.palette[colour];
      pixels.data[at++] = DATA.palette[colour + 1];
      pixels.data[at++] = DATA.palette[colour + 2];
      pixels.data[at++] = 255;
    }
  }
  context.putImageData(pixels, 0, 0);
  if (described.box) drawBox(context, described.box, scale);
}

function drawBox(context, [left, top, right, bottom], scale) {
  for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
  }
}

// Cards

function fillSwitch(container, image, choose) {
  container.replaceChildren(
    ...image.classes.map((described, rank) => {
      const button = made("button", { type: "button", textContent: described.label });
      button.setAttribute("aria-pressed", String(rank === image.rank));
      button.title = `Heatmap of ${described.label}, ${strength(described)}`;
      button.addEventListener("click", () => choose(rank));
      return button;
    }),
  );
}

function showPressed(container, image) {
  [...container.children].forEach((button, i) => button.setAttribute("aria-pressed", String(i === image.rank)));
}

function makeCard(image) {
  const canvas = made("canvas", {});
  canvas.setAttribute("aria-hidden", "true");
  const photo = made("img", { loading: "lazy", decoding: "async", alt: "", src: image.thumbnail });
  const path = made("small", { title: image.path }, made("bdi", { textContent: image.path }));
  const open = made(
    "button",
    { type: "button", className: "open" },
    made("div", { className: "frame" }, photo, canvas),
    made("div", { className: "facts" }, made("b", { textContent: image.best.label }), made("span", { textContent: strength(image.best) }), path),
  );
  open.setAttribute("aria-label", `${image.path}: ${image.best.label}, ${strength(image.best)}. Open the large view`);
  open.addEventListener("click", () => showLarge(image));
  const choices = made("div", { className: "switch" });
  choices.setAttribute("role", "group");
  choices.setAttribute("aria-label", `Heatmap of class, ${image.path}`);
  image.caption = made("p", { className: "caption" });
  image.card = made("li", { className: "card" }, open, image.caption, choices);
  image.open = open;
  image.canvas = canvas;
  image.choices = choices;
  image.card.image = image;
  fillSwitch(choices, image, (rank) => chooseClass(image, rank));
  showCaption(image);
}

function showCaption(image) {
  image.caption.textContent = image.classes[image.rank]?.caption ?? "";
}

function chooseClass(image, rank) {
  image.rank = Math.max(0, Math.min(rank, image.classes.length - 1));
  showPressed(image.choices, image);
  showCaption(image);
  if (image.drawn) drawHeatmap(image.canvas, image);
  if (large.open && large.image === image) showLarge(image);
}

// Only images near the visible area are drawn.
const watcher = new IntersectionObserver(
  (changes) => {
    for (const { target, isIntersecting } of changes) {
      const image = target.image;
      if (isIntersecting && !image.drawn) drawHeatmap(image.canvas, image);
      if (!isIntersecting && image.drawn) image.canvas.width = image.canvas.height = 0;
      image.drawn = isIntersecting;
    }
  },
  { rootMargin: "300px" },
);

// Filter and sort

const ORDERS = {
  order: (a, b) => a.order - b.order,
  path: (a, b) => a.path.localeCompare(b.path, undefined, { numeric: true }),
  low: (a, b) => sortKey(a.best) - sortKey(b.best),
  high: (a, b) => sortKey(b.best) - sortKey(a.best),
  label: (a, b) => a.best.label.localeCompare(b.best.label) || sortKey(b.best) - sortKey(a.best),
};

function arrange() {
  const text = by("search").value.trim().toLowerCase();
  const index = by("label").value;
  const low = by("low").value === "" ? 0 : by("low").valueAsNumber / 100;
  const high = by("high").value === "" ? 1 : by("high").valueAsNumber / 100;
  visible = images
    .filter(
      (image) =>
        image.path.toLowerCase().includes(text) &&
        (index === "" || key(image.best) === index) &&
        (!hasProbability(image.best) ||
          (image.best.probability >= low && image.best.probability <= (high >= 1 ? Infinity : high))),
    )
    .sort(ORDERS[by("sort").value]);
  by("images").replaceChildren(...visible.map((image) => image.card));
  by("count").textContent = `${visible.length} of ${images.length} images`;
  by("none").hidden = visible.length > 0;
}

function reset() {
  by("search").value = by("label").value = "";
  by("low").value = 0;
  by("high").value = 100;
  arrange();
  by("images").focus();
}

// Large view

const large = by("large");

function showLarge(image) {
  // Rebuilt only for another image, so that a pressed button keeps the focus.
  const isAnother = large.image !== image;
  large.image = image;
  const [height, width] = image.image_size;
  const frame = large.querySelector(".frame");
  frame.style.aspectRatio = `${width} / ${height}`;
  const photo = frame.querySelector("img");
  photo.src = image.thumbnail;
  const described = image.classes[image.rank] ?? NOTHING;
  photo.alt = image.classes.length ? `${image.path}, with the heatmap of ${described.label}` : image.path;
  drawHeatmap(frame.querySelector("canvas"), image);
  by("large-title").textContent = image.path;
  large.querySelector(".notes").textContent = [...image.notes, described.caption ?? ""].join(" ").trim();
  large.querySelector(".top").replaceChildren(
    ...image.top.map((described) => {
      const row = made("li", {}, made("span", { textContent: described.label }), made("span", { textContent: strength(described) }));
      row.style.setProperty("--share", `${100 * (described.probability ?? 0)}%`);
      return row;
    }),
  );
  if (isAnother) fillSwitch(large.querySelector(".switch"), image, (rank) => chooseClass(image, rank));
  else showPressed(large.querySelector(".switch"), image);
  large.querySelector(".links").replaceChildren(
    ...image.classes.map(({ label, file }) => made("a", { href: file, target: "_blank", textContent: `File: ${label}` })),
  );
  // Not disabled, because a disabled button loses the focus.
  by("previous").setAttribute("aria-disabled", String(visible.indexOf(image) <= 0));
  by("next").setAttribute("aria-disabled", String(visible.indexOf(image) >= visible.length - 1));
  if (!large.open) large.showModal();
}

const stepLarge = (step) => {
  const next = visible[visible.indexOf(large.image) + step];
  if (next) showLarge(next);
};

// Keyboard

function cardsInARow() {
  if (visible.length === 0) return 1;
  const first = visible[0].card.offsetTop;
  const second = visible.findIndex((image) => image.card.offsetTop > first);
  return second > 0 ? second : visible.length;
}

function stepFocus(step) {
  const at = visible.findIndex((image) => image.card.contains(document.activeElement));
  const next = at < 0 ? 0 : at + step;
  visible[next]?.open.focus();
}

function chooseEverywhere(rank) {
  by("rank").value = String(rank);
  images.forEach((image) => chooseClass(image, rank));
}

const setOpacity = (value) => {
  by("opacity").value = value;
  document.documentElement.style.setProperty("--opacity", by("opacity").value);
};
const setHeat = (on) => {
  by("heat").checked = on;
  document.body.classList.toggle("no-heat", !on);
};

const KEYS = {
  ArrowRight: () => (large.open ? stepLarge(1) : stepFocus(1)),
  ArrowLeft: () => (large.open ? stepLarge(-1) : stepFocus(-1)),
  ArrowDown: () => (large.open ? stepLarge(1) : stepFocus(cardsInARow())),
  ArrowUp: () => (large.open ? stepLarge(-1) : stepFocus(-cardsInARow())),
  h: () => setHeat(!by("heat").checked),
  "+": () => setOpacity(Number(by("opacity").value) + 0.1),
  "-": () => setOpacity(Number(by("opacity").value) - 0.1),
  "/": () => !large.open && by("search").focus(),
  "?": () => !large.open && by("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input:not([type=checkbox]), select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || by("help").open) return;
  // Single-character shortcuts can be switched off, because speech input triggers them by accident (WCAG 2.1.4).
  if (event.key.length === 1 && !by("shortcuts").checked) return;
  const digit = /^[1-9]$/.test(event.key) ? Number(event.key) - 1 : -1;
  const most = images.reduce((found, image) => Math.max(found, image.classes.length), 0);
  if (digit >= 0 && digit < most) {
    if (large.open) chooseClass(large.image, digit);
    else chooseEverywhere(digit);
  } else if (event.key in KEYS) {
    KEYS[event.key]();
  } else {
    return;
  }
  event.preventDefault();
});

// Start

function fillSelects() {
  const counts = new Map();
  for (const { best } of images) {
    const known = counts.get(key(best)) ?? { label: best.label, count: 0 };
    counts.set(key(best), { ...known, count: known.count + 1 });
  }
  const sorted = [...counts].sort(([, a], [, b]) => a.label.localeCompare(b.label));
  by("label").append(...sorted.map(([index, { label, count }]) => made("option", { value: index, textContent: `${label} (${count})` })));
  const most = images.reduce((found, image) => Math.max(found, image.classes.length), 1);
  const names = Array.from({ length: most }, (_, rank) => made("option", { value: rank, textContent: `class ${rank + 1}` }));
  by("rank").append(...names);
}

function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  by("theme").setAttribute("aria-pressed", String(dark));
}

by("theme").setAttribute("aria-pressed", String(matchMedia("(prefers-color-scheme: dark)").matches));
by("theme").addEventListener("click", () => setTheme(by("theme").getAttribute("aria-pressed") !== "true"));
by("keys").addEventListener("click", () => by("help").showModal());
by("reset").addEventListener("click", reset);
by("previous").addEventListener("click", () => stepLarge(-1));
by("next").addEventListener("click", () => stepLarge(1));
by("rank").addEventListener("change", () => chooseEverywhere(Number(by("rank").value)));
by("opacity").addEventListener("input", () => setOpacity(by("opacity").value));
by("heat").addEventListener("change", () => setHeat(by("heat").checked));
large.addEventListener("close", () => large.image.open.focus());
for (const id of ["search", "label", "low", "high", "sort"]) by(id).addEventListener("input", arrange);
fillSelects();
setOpacity(DATA.alpha);
images.forEach((image) => {
  makeCard(image);
  watcher.observe(image.card);
});
arrange();
