// Goes on from scores.js, whose constants and helpers it uses.

// --- the maps of a photo: a script of its own, run when the photo comes into view ---
const arriving = new Map(); // id -> what takes the data
const promised = new Map(); // id -> promise of its maps

window.hsegPhoto = (id, data) => arriving.get(id)?.(data);

function load(id) {
  if (promised.size > KEPT) promised.clear();
  if (!promised.has(id)) promised.set(id, fetchMaps(id));
  return promised.get(id);
}

async function fetchMaps(id) {
  const script = el("script", { src: address("report", id, "js") });
  const data = await new Promise((resolve, reject) => {
    arriving.set(id, resolve);
    script.onerror = () => reject(new Error(`${script.getAttribute("src")} is missing`));
    document.head.append(script);
  }).finally(() => script.remove());
  const packed = Uint8Array.from(atob(data.packed), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const [width, height] = data.size, [scoreWidth, scoreHeight] = data.scoreSize, size = width * height;
  const truth = bytes.subarray(0, size), leaves = bytes.subarray(size, 2 * size);
  return { width, height, truth, leaves, scoreWidth, scoreHeight, scores: bytes.subarray(2 * size) };
}

const address = (folder, id, suffix) => `pictures/${folder}/${encodeURIComponent(id)}.${suffix}`;

// --- pictures ---
const pack = ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; // a pixel of a canvas as one number
const CLEAR = 0;

function paint(canvas, width, height, pixelAt) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = pixelAt(i);
  context.putImageData(image, 0, 0);
}

const classAt = (value, level) => (isNode(value) ? level.table[value] : value);
const colourOf = (value) => (isNode(value) ? nodes[value].colour : VOID);
const byValue = (make) => Array.from({ length: 256 }, (_, value) => make(value));
const PIXELS = byValue((value) => pack(colourOf(value)));
const OVER_PHOTO = byValue((value) => (nodes[value]?.background ? CLEAR : PIXELS[value]));
const heat = (value) => HEAT[0].map((dark, i) => dark + Math.sqrt(value / 255) * (HEAT[1][i] - dark)); // most are small
const HEAT_PIXELS = byValue((value) => pack(heat(value)));
const [VOID_PIXEL, RIGHT_BACKGROUND_PIXEL, RIGHT_PIXEL, WRONG_PIXEL] = [VOID, RIGHT_BACKGROUND, RIGHT, WRONG].map(pack);

function difference(truth, predicted) {
  if (!isNode(truth)) return VOID_PIXEL;
  if (truth !== predicted) return WRONG_PIXEL;
  return nodes[truth].background ? RIGHT_BACKGROUND_PIXEL : RIGHT_PIXEL;
}

/** How far the worst edge breaks the tree: the largest excess of a child's score over its parent's, 0 to 255. */
function excess(maps, i) {
  const size = maps.scoreWidth * maps.scoreHeight;
  let worst = 0;
  for (const [parent, child] of report.edges)
    worst = Math.max(worst, maps.scores[child * size + i] - maps.scores[parent * size + i]);
  return worst;
}

/** The tiles of a photo: caption, and what paints it once the maps are there. At a glance: four of the finest level. */
function tilesOf(photo, view) {
  const tiles = [
    { caption: "photo", photo: true },
    { caption: "overlay", photo: true, draw: (maps, canvas) =>
      paint(canvas, maps.width, maps.height, (i) => OVER_PHOTO[maps.leaves[i]]) },
    { caption: `violations ${share(photo.violations, 2)}`, draw: (maps, canvas) =>
      paint(canvas, maps.scoreWidth, maps.scoreHeight, (i) => HEAT_PIXELS[excess(maps, i)]) },
  ];
  for (const level of isGlance(view) ? levels.slice(0, 1) : view === "all" ? levels : [levels[view]]) {
    const of = isGlance(view) ? "" : `${level.name}: `, draw = (pixelAt) => (maps, canvas) => paint(canvas, maps.width, maps.height, (i) =>
      pixelAt(classAt(maps.truth[i], level), classAt(maps.leaves[i], level)));
    tiles.push({ caption: `${of}truth`, draw: draw((truth) => PIXELS[truth]) },
      { caption: `${of}prediction`, draw: draw((_, predicted) => PIXELS[predicted]) },
      { caption: `${of}difference`, draw: draw(difference) });
  }
  return isGlance(view) ? [0, 1, 3, 5].map((i) => tiles[i]) : tiles;
}

const isGlance = (view) => view === "glance";

function card(photo, view) {
  const open = el("button", { type: "button", title: "enlarge" }, photo.id);
  const values = levels.slice(0, isGlance(view) ? 1 : undefined).map((level, i) => el("span", {}, `mIoU${level.number} ${share(photo.mIoU[i])}`));
  const wanted = nodes[control("class")];
  if (wanted) values.push(el("span", {}, swatch(wanted.colour), `${wanted.name} ${share(photo.IoU[wanted.id])}`));
  const grid = el("div", { class: "tiles" }), tiles = tilesOf(photo, view);
  const element = el("article", { class: "card", "data-id": photo.id }, el("header", {}, open, ...values), grid);
  for (const tile of tiles) {
    const picture = el("div", { class: "picture" });
    picture.style.aspectRatio = `${photo.size[0]} / ${photo.size[1]}`; // nothing moves when the maps arrive
    if (tile.photo) picture.append(el("img", { src: address("report", photo.id, "jpg"), loading: "lazy", alt: `photo ${photo.id}` }));
    if (tile.draw) picture.append(el("canvas", { class: tile.photo ? "over" : "", role: "img", "aria-label": `${photo.id}, ${tile.caption}` }));
    grid.append(el("figure", { class: "tile" }, picture, el("figcaption", { title: tile.caption }, tile.caption)));
  }
  element.style.setProperty("--columns", Math.ceil(tiles.length / 3));
  element.style.setProperty("--ratio", photo.size[0] / photo.size[1]);
  Object.assign(element, { photo, tiles });
  open.addEventListener("click", () => openViewer(photo));
  near.observe(element);
  return element;
}

async function fill(element) {
  try {
    const maps = element.maps = await load(element.photo.id), pictures = element.querySelectorAll(".picture");
    element.tiles.forEach((tile, i) => tile.draw?.(maps, pictures[i].querySelector("canvas")));
    element.dataset.drawn = "yes";
  } catch (error) {
    element.querySelector("header").append(el("span", { class: "warning" }, `cannot be drawn: ${error.message}`));
  }
}

const near = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((entry) => entry.isIntersecting)) {
    near.unobserve(entry.target);
    fill(entry.target);
  }
}, { rootMargin: "400px" });

// --- what lies under the pointer ---
const readoutBox = find("readout"); // not looked up again: the viewer empties itself with the box inside

function point(event) {
  const picture = event.target.closest?.(".picture"), element = picture?.closest(".card");
  if (!element?.maps) return hideReadout();
  const box = picture.getBoundingClientRect();
  const x = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 0.9999);
  const y = Math.min(Math.max((event.clientY - box.top) / box.height, 0), 0.9999);
  document.querySelectorAll(".card.pointed").forEach((other) => other.classList.remove("pointed"));
  element.classList.add("pointed");
  const { width, height } = element.maps, even = (share, size) => 2 * Math.floor((share * size) / 2);
  const column = even(x, width), row = even(y, height); // scores lie on every other pixel: all is said of one of those
  element.style.setProperty("--x", `${(100 * (column + 0.5)) / width}%`);
  element.style.setProperty("--y", `${(100 * (row + 0.5)) / height}%`);
  showReadout(readout(element.maps, column, row), event);
}

function readout(maps, column, row) {
  const truth = maps.truth[row * maps.width + column], leaf = maps.leaves[row * maps.width + column];
  const size = maps.scoreWidth * maps.scoreHeight, i = (row / 2) * maps.scoreWidth + column / 2;
  const score = (id) => maps.scores[id * size + i];
  const line = (title, value) => el("p", {}, `${title} `, swatch(colourOf(value)), isNode(value) ? path(value).join(" › ") : "void");
  const predicted = new Set(path(leaf)), rows = report.order.map((id) => {
    const node = nodes[id], bar = el("i"), name = el("span", {}, swatch(node.colour), node.name);
    const violated = node.parent !== null && score(id) >= 128 && score(node.parent) < 128;
    name.style.paddingLeft = `${0.8 * (path(id).length - 1)}em`;
    bar.style.width = `${(100 * score(id)) / 255}%`;
    return el("div", { class: `node${predicted.has(node.name) ? " predicted" : ""}${violated ? " violated" : ""}` },
      name, bar, el("span", {}, (violated ? "⚠ " : "") + share((score(id) + 0.5) / 256, 0)));
  });
  return [line("truth:", truth), line("prediction:", leaf), ...rows];
}

function showReadout(children, event) {
  const box = readoutBox;
  (find("viewer").open ? find("viewer") : document.body).append(box); // a modal dialog covers everything else
  box.replaceChildren(...children);
  box.hidden = false;
  const right = event.clientX + 18 + box.offsetWidth < innerWidth;
  box.style.left = `${right ? event.clientX + 18 : Math.max(4, event.clientX - 18 - box.offsetWidth)}px`;
  box.style.top = `${Math.max(4, Math.min(event.clientY + 18, innerHeight - box.offsetHeight - 6))}px`;
}

function hideReadout() {
  readoutBox.hidden = true;
  document.querySelectorAll(".card.pointed").forEach((element) => element.classList.remove("pointed"));
}

// --- the gallery ---
const control = (name) => find(name).value;
let chosen = [], page = 0; // the photos that pass the filter, in order; the page that is shown

function sortValue(photo) {
  const by = control("sort");
  if (by === "violations") return photo.violations === null ? null : -photo.violations;
  return by === "class" ? photo.IoU[control("class")] : photo.mIoU[Number(by.split("-")[1])];
}

function passes(photo) {
  if (!photo.id.toLowerCase().includes(control("search").trim().toLowerCase())) return false;
  if (control("class") === "") return true;
  const [truth, predicted] = [photo.truth, photo.predicted].map((found) => found.includes(Number(control("class"))));
  const answers = { either: truth || predicted, truth, predicted, missed: truth && !predicted, invented: predicted && !truth };
  return answers[control("where")];
}

function choose() {
  const direction = control("order") === "worst" ? 1 : -1, byId = control("sort") === "id";
  const keys = new Map(photos.map((photo) => [photo, byId ? photo.id : sortValue(photo)]));
  chosen = photos.filter(passes).sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (x === null || y === null) return (x === null) - (y === null); // without a score: last
    return direction * ((x > y) - (x < y));
  });
  showPage(0);
}

function showPage(wanted) {
  const last = Math.max(0, Math.ceil(chosen.length / PAGE) - 1), view = control("level");
  page = Math.min(Math.max(wanted, 0), last);
  near.disconnect();
  hideReadout();
  const cards = chosen.slice(page * PAGE, (page + 1) * PAGE).map((photo) => card(photo, view));
  find("gallery").className = isGlance(view) ? "glance" : "";
  find("gallery").replaceChildren(...(cards.length ? cards : [el("p", { class: "empty" }, "No photo is like that.")]));
  const place = `${page * PAGE + 1}–${page * PAGE + cards.length} of ${chosen.length.toLocaleString("en")}`;
  document.querySelector("#pager output").textContent = cards.length ? place : "none";
  for (const button of document.querySelectorAll("#pager button")) // not `disabled`, which would lose the focus
    button.ariaDisabled = page === (button.dataset.step < 0 ? 0 : last);
}

function turn(wanted) {
  showPage(wanted);
  find("controls").scrollIntoView();
}

// --- one photo, large ---
let viewed = 0;

function openViewer(photo) {
  showInViewer(chosen.indexOf(photo));
  if (!find("viewer").open) find("viewer").showModal();
}

function showInViewer(index) {
  viewed = Math.min(Math.max(index, 0), chosen.length - 1);
  hideReadout();
  find("viewed").replaceChildren(card(chosen[viewed], "all"));
  find("viewed-place").textContent = `${viewed + 1} of ${chosen.length.toLocaleString("en")}`;
  find("full-size").href = address("overlay", chosen[viewed].id, "jpg");
}

function onViewerClosed() {
  hideReadout();
  find("viewed").replaceChildren();
  const isElsewhere = page !== Math.floor(viewed / PAGE);
  if (isElsewhere) turn(Math.floor(viewed / PAGE));
  find("gallery").children[viewed % PAGE].querySelector("button")?.focus({ preventScroll: !isElsewhere });
}

// --- controls ---
const option = (value, text) => el("option", { value }, text);

function drawControls() {
  find("sort").append(...levels.map((level, i) => option(`level-${i}`, `mIoU${level.number} of the photo`)),
    option("class", "IoU of the class"), option("violations", "violations"), option("id", "id"));
  find("level").append(option("glance", "at a glance"), option("all", "all levels"), ...levels.map((level, i) => option(i, `level ${level.number}: ${level.name}`)));
  find("class").append(option("", "any"));
  const seen = new Set();
  for (const level of levels) {
    const fresh = levelNodes(level).filter((node) => !seen.has(node.id) && seen.add(node.id));
    if (fresh.length) find("class").append(el("optgroup", { label: level.name }, ...fresh.map((node) => option(node.id, node.name))));
  }
}

function onControl() {
  const isAny = control("class") === ""; // then there is nothing to say about where it is, and no IoU of it
  find("where").disabled = find("sort").querySelector("[value=class]").disabled = isAny;
  if (isAny && control("sort") === "class") find("sort").value = "level-0";
  choose();
}

function drawLegend(box) {
  const entry = (mark, ...text) => el("span", {}, mark, ...text);
  const nodeEntry = (id) => el("span", { title: path(id).join(" › ") }, "›".repeat(path(id).length - 1), swatch(nodes[id].colour), nodes[id].name);
  const ramp = el("span", { class: "ramp" });
  ramp.style.background = `linear-gradient(to right, ${HEAT.map(css)})`;
  box.append(...report.order.map(nodeEntry),
    entry(swatch(VOID), "void"), entry(swatch(WRONG), "differs"), entry(swatch(RIGHT), "agrees"),
    entry(ramp, "violation: how far a score exceeds its parent's, 0 to 1 on a square-root scale"));
}

function drawDetails() {
  for (const name of ["config", "environment"]) find(name).textContent = JSON.stringify(scores[name], null, 2);
  const faults = Object.entries(scores.left_out).map(([id, fault]) => el("li", {}, `${id}: ${fault}`));
  if (faults.length) find("left-out").append(el("p", { class: "warning" }, `${faults.length} photos could not be read and are in no score:`), el("ul", {}, ...faults));
}

let byPointer = false;

function onKey(event) {
  byPointer = false;
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input, select, textarea")) return;
  const step = { ArrowRight: 1, j: 1, ArrowLeft: -1, k: -1 }[event.key];
  if (!step) return;
  event.preventDefault();
  if (find("viewer").open) showInViewer(viewed + step);
  else turn(page + step);
}

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", () => { byPointer = true; }, true);
  // a list chosen from with the mouse would go on taking the arrow keys
  document.addEventListener("change", (event) => { if (byPointer && event.target.matches("select")) event.target.blur(); });
  document.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch") point(event); });
  document.addEventListener("pointerdown", point);
  document.addEventListener("scroll", hideReadout, { passive: true });
  find("gallery").addEventListener("click", (event) => {
    const element = event.target.closest(".picture")?.closest(".card");
    if (element && event.pointerType !== "touch") openViewer(element.photo);
  });
  find("viewer").addEventListener("close", onViewerClosed);
  find("viewed-before").addEventListener("click", () => showInViewer(viewed - 1));
  find("viewed-next").addEventListener("click", () => showInViewer(viewed + 1));
  find("viewer-close").addEventListener("click", () => find("viewer").close());
  for (const button of document.querySelectorAll("#pager button"))
    button.addEventListener("click", () => turn(page + Number(button.dataset.step)));
  find("controls").addEventListener("input", onControl);
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  find("share").addEventListener("change", drawConfusion);
}

drawHead();
find("score-tables").append(...levels.map(scoreTable));
drawRules();
drawConfusion();
drawLegend(find("legend"));
drawLegend(find("viewer-legend"));
drawControls();
drawDetails();
listen();
onControl();
