"use strict";
// Every text reaches the page as a text node or attribute, never as HTML: names and ids may hold anything.

const find = (id) => document.getElementById(id);
const { nodes, background, paths, order, levels, photos } = JSON.parse(find("data").textContent);
const MORE = 24; // photos at a time
const VOID = [110, 110, 110], RIGHT = [214, 235, 229], WRONG = [179, 38, 30];

const isNode = (value) => value < nodes.length;
const share = (value, digits = 1) => (value === null ? "–" : `${(100 * value).toFixed(digits)}\u00a0%`); // unbroken
const address = (folder, id, suffix) => `pictures/${folder}/${encodeURIComponent(id)}.${suffix}`;

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const swatch = (colour) => el("span", { class: "swatch", style: `background: rgb(${colour})` });

// --- the maps of a photo: a script of its own, run when the photo comes into view ---
window.hsegMaps = (packed) => document.currentScript.arrived(packed);

async function load(photo) {
  const script = el("script", { src: address("report", photo.id, "js") });
  const packed = await new Promise((resolve, reject) => {
    script.arrived = resolve;
    script.onerror = () => reject(new Error(`${script.getAttribute("src")} is missing`));
    document.head.append(script);
  }).finally(() => script.remove());
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const maps = new Uint8Array(await new Response(stream).arrayBuffer()), size = photo.size[0] * photo.size[1];
  return { truth: maps.subarray(0, size), leaves: maps.subarray(size, 2 * size), scores: maps.subarray(2 * size) };
}

// --- pictures ---
const CLEAR = [0, 0, 0, 0];
const pack = ([r, g, b, alpha = 255]) => ((alpha << 24) | (b << 16) | (g << 8) | r) >>> 0; // a canvas's pixel as one number
const colourOf = (value) => (isNode(value) ? nodes[value].colour : VOID);
const classAt = (value, level) => (isNode(value) ? level.table[value] : value);

const difference = (truth, predicted) => (!isNode(truth) ? VOID : truth === predicted ? RIGHT : WRONG);

/** The tiles of a photo: its caption, whether the photo lies below, and the colour of a pixel. */
function tilesOf(isLarge) {
  const tiles = [["photo", true], ["overlay", true, (_, leaf) => (background.includes(leaf) ? CLEAR : colourOf(leaf))]];
  for (const level of isLarge ? levels : levels.slice(0, 1)) {
    const of = isLarge ? `${level.name}: ` : "", at = (value) => classAt(value, level);
    tiles.push([`${of}truth`, false, (truth) => colourOf(at(truth))]);
    if (isLarge) tiles.push([`${of}prediction`, false, (_, leaf) => colourOf(at(leaf))]);
    tiles.push([`${of}difference`, false, (truth, leaf) => difference(at(truth), at(leaf))]);
  }
  return tiles;
}

function paint(canvas, { truth, leaves }, colourAt) {
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer), known = new Map();
  for (let i = 0; i < pixels.length; i++) {
    const pair = 256 * truth[i] + leaves[i];
    if (!known.has(pair)) known.set(pair, pack(colourAt(truth[i], leaves[i])));
    pixels[i] = known.get(pair);
  }
  context.putImageData(image, 0, 0);
}

function card(photo, isLarge) {
  const [width, height] = photo.size, key = Number(find("key").value), tiles = tilesOf(isLarge);
  const values = levels.map((_, i) => i).filter((i) => isLarge || i === 0).concat(key < levels.length ? [] : [key]);
  const texts = values.map((i) => el("span", {}, `${find("key").options[i].text} ${share(photo.values[i])}`));
  const open = el("button", { type: "button", title: "larger or smaller" }, photo.id), grid = el("div", { class: "tiles" });
  if (isLarge) texts.push(el("a", { href: address("overlay", photo.id, "jpg"), target: "_blank" }, "full size"));
  const kind = isLarge ? "card large" : "card", header = el("header", {}, open, ...texts);
  const element = el("article", { class: kind, "data-id": photo.id }, header, grid);
  for (const [caption, onPhoto, colourAt] of tiles) {
    const picture = el("div", { class: "picture", style: `aspect-ratio: ${width} / ${height}` }); // nothing moves later
    if (onPhoto) picture.append(el("img", { src: address("report", photo.id, "jpg"), loading: "lazy", alt: `photo ${photo.id}` }));
    if (colourAt) picture.append(el("canvas", { width, height, role: "img", "aria-label": `${photo.id}, ${caption}` }));
    grid.append(el("figure", {}, picture, el("figcaption", {}, caption)));
  }
  element.style.setProperty("--ratio", width / height);
  element.style.setProperty("--columns", 1 + levels.length);
  Object.assign(element, { photo, tiles });
  open.addEventListener("click", () => enlarge(element));
  near.observe(element);
  return element;
}

async function fill(element) {
  try {
    const maps = element.maps = await load(element.photo), pictures = element.querySelectorAll(".picture");
    element.tiles.forEach(([, , colourAt], i) => colourAt && paint(pictures[i].querySelector("canvas"), maps, colourAt));
    element.dataset.drawn = "yes";
  } catch (error) {
    element.querySelector("header").append(el("span", { class: "warning" }, `cannot be drawn: ${error.message}`));
  }
}

const near = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    near.unobserve(target);
    fill(target);
  }
}, { rootMargin: "400px" });

// --- what lies under the pointer ---
function point(event) {
  hideReadout();
  const picture = event.target.closest?.(".picture"), element = picture?.closest(".card");
  if (!element?.maps) return;
  const box = picture.getBoundingClientRect(), [width, height] = element.photo.size;
  // scores lie on every other pixel of the maps: all is said of one of those
  const even = (share, size) => 2 * Math.floor((Math.min(Math.max(share, 0), 0.9999) * size) / 2);
  const column = even((event.clientX - box.left) / box.width, width), row = even((event.clientY - box.top) / box.height, height);
  const readout = find("readout");
  readout.replaceChildren(...lines(element, column, row));
  readout.hidden = false;
  const left = event.clientX + 18 + readout.offsetWidth < innerWidth ? event.clientX + 18 : event.clientX - 18 - readout.offsetWidth;
  readout.style.left = `${Math.max(4, left)}px`;
  readout.style.top = `${Math.max(4, Math.min(event.clientY + 18, innerHeight - readout.offsetHeight - 6))}px`;
}

function lines({ maps, photo }, column, row) {
  const [width, height] = photo.size, [across, down] = [Math.ceil(width / 2), Math.ceil(height / 2)];
  const truth = maps.truth[row * width + column], leaf = maps.leaves[row * width + column];
  const score = (id) => maps.scores[id * across * down + (row / 2) * across + column / 2];
  const line = (title, value) => el("p", {}, `${title} `, swatch(colourOf(value)),
    isNode(value) ? paths[value].map((id) => nodes[id].name).join(" › ") : "void");
  return [line("truth:", truth), line("prediction:", leaf), ...order.map((id) => {
    const indent = `padding-left: ${0.8 * (paths[id].length - 1)}em`, bar = `width: ${score(id) / 2.55}%`;
    return el("div", { class: `node${paths[leaf].includes(id) ? " predicted" : ""}` },
      el("span", { style: indent }, swatch(nodes[id].colour), nodes[id].name), el("i", { style: bar }),
      el("span", {}, share((score(id) + 0.5) / 256, 0)));
  })];
}

const hideReadout = () => { find("readout").hidden = true; };

// --- the gallery ---
let chosen = []; // the photos that pass the filter, in order

function choose() {
  const key = Number(find("key").value), wanted = find("search").value.trim().toLowerCase();
  const isBest = find("order").value === "the best";
  chosen = photos.filter((photo) => photo.id.toLowerCase().includes(wanted)).sort((a, b) => {
    const [x, y] = [a.values[key], b.values[key]];
    if (x === null || y === null) return (x === null) - (y === null); // without a value: last
    return isBest ? y - x : x - y;
  });
  find("gallery").replaceChildren();
  more();
}

function more() {
  const shown = find("gallery").children.length, cards = chosen.slice(shown, shown + MORE).map((photo) => card(photo, false));
  hideReadout();
  find("gallery").append(...cards);
  const all = chosen.length, now = shown + cards.length;
  find("more").textContent = `${now} of ${all.toLocaleString("en")} photos${now < all ? ": show more" : ""}`;
}

/** The card of a photo with all levels in place of the one with the leaves alone, and back. */
function enlarge(element) {
  const other = card(element.photo, !element.matches(".large"));
  hideReadout();
  element.replaceWith(other);
  other.querySelector("button").focus();
  other.scrollIntoView({ block: "nearest" });
}

document.addEventListener("pointermove", (event) => event.pointerType !== "touch" && point(event));
document.addEventListener("pointerdown", point);
document.addEventListener("scroll", hideReadout, { passive: true });
find("gallery").addEventListener("click", (event) => {
  const element = event.target.closest(".picture")?.closest(".card");
  if (element && event.pointerType !== "touch") enlarge(element); // a touch reads
});
find("more").addEventListener("click", more);
find("controls").addEventListener("input", choose);
find("controls").addEventListener("submit", (event) => event.preventDefault());
choose();
