// Goes on from scores.js, whose constants and helpers it uses.

// --- the maps of a photo: a script of its own, run when the photo comes into view ---
const arriving = new Map(); // id -> what takes the data
const kept = new Map(); // id -> promise of its maps, the oldest first

window.hsegPhoto = (id, data) => arriving.get(id)?.(data);

function load(id) {
  const known = kept.get(id);
  kept.delete(id);
  kept.set(id, known ?? fetchMaps(id));
  for (const old of kept.keys()) if (kept.size > KEPT) kept.delete(old);
  return kept.get(id);
}

async function fetchMaps(id) {
  const script = el("script", { src: address("report", id, "js") });
  try {
    const data = await new Promise((resolve, reject) => {
      arriving.set(id, resolve);
      script.onerror = () => reject(new Error(`${script.getAttribute("src")} is missing`));
      document.head.append(script);
    });
    const [width, height] = data.size, [scoreWidth, scoreHeight] = data.scoreSize, bytes = await unpack(data.packed);
    const truth = bytes.subarray(0, width * height), leaves = bytes.subarray(width * height, 2 * width * height);
    return { width, height, truth, leaves, scoreWidth, scoreHeight, scores: bytes.subarray(2 * width * height) };
  } finally {
    arriving.delete(id);
    script.remove();
  }
}

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
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
const HEAT_PIXELS = byValue((value) => pack(heat(Math.sqrt(255 * value)))); // small violations are the common ones
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

function heat(value) {
  const place = (value / 255) * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[low].map((start, i) => start + (HEAT[low + 1][i] - start) * (place - low));
}

/** The tiles of a photo: caption, and what paints it once the maps are there. At a glance: four of the finest level. */
function tilesOf(photo, view) {
  const tiles = [
    { caption: "photo", photo: true },
    { caption: "overlay", photo: true, draw: (maps, canvas) =>
      paint(canvas, maps.width, maps.height, (i) => OVER_PHOTO[maps.leaves[i]]) },
    { caption: `violations ${percent(photo.violations, 2)} %`, draw: (maps, canvas) =>
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
  const values = levels.slice(0, isGlance(view) ? 1 : undefined).map((level, i) => el("span", {}, `mIoU${level.number} ${percent(photo.mIoU[i])} %`));
  const chosen = state.class === "" ? null : nodes[state.class];
  if (chosen) values.push(el("span", {}, swatch(chosen.colour), `${chosen.name} ${percent(photo.IoU[chosen.id])} %`));
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
      name, bar, el("span", {}, `${violated ? "⚠ " : ""}${((score(id) + 0.5) / 2.56).toFixed(0)} %`));
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
const state = { sort: "level-0", order: "worst", class: "", where: "either", search: "", level: "glance", page: 0 };
let chosen = []; // the photos that pass the filter, in order

function sortValue(photo) {
  if (state.sort === "violations") return photo.violations === null ? null : -photo.violations;
  if (state.sort === "class") return state.class === "" ? null : photo.IoU[state.class];
  return photo.mIoU[Number(state.sort.split("-")[1])];
}

function passes(photo) {
  if (!photo.id.toLowerCase().includes(state.search.trim().toLowerCase())) return false;
  if (state.class === "") return true;
  const truth = photo.truth.includes(Number(state.class)), predicted = photo.predicted.includes(Number(state.class));
  return { either: truth || predicted, truth, predicted, missed: truth && !predicted, invented: predicted && !truth }[state.where];
}

function choose() {
  const direction = state.order === "worst" ? 1 : -1;
  chosen = photos.filter(passes);
  if (state.sort === "id") chosen.sort((a, b) => direction * (a.id < b.id ? -1 : 1));
  else chosen.sort((a, b) => {
    const [x, y] = [sortValue(a), sortValue(b)];
    if (x === null || y === null) return (x === null) - (y === null); // without a score: last
    return direction * (x - y);
  });
  showPage(0);
}

function showPage(page) {
  const last = Math.max(0, Math.ceil(chosen.length / PAGE) - 1);
  state.page = Math.min(Math.max(page, 0), last);
  const start = state.page * PAGE;
  near.disconnect();
  hideReadout();
  const cards = chosen.slice(start, start + PAGE).map((photo) => card(photo, state.level));
  find("gallery").className = state.level === "glance" ? "glance" : "";
  find("gallery").replaceChildren(...(cards.length ? cards : [el("p", { class: "empty" }, "No photo is like that.")]));
  const text = chosen.length ? `${start + 1}–${start + cards.length} of ${chosen.length.toLocaleString("en")}` : "none";
  for (const output of document.querySelectorAll(".pager output")) output.textContent = text;
  for (const button of document.querySelectorAll(".pager button")) // not `disabled`, which would lose the focus
    button.setAttribute("aria-disabled", state.page === (button.backwards ? 0 : last));
}

function turn(page) {
  showPage(page);
  find("controls").scrollIntoView();
}

function drawPagers() {
  const far = 1e9, steps = [["«", "first page", -far], ["‹", "page back", -1], null, ["›", "next page", 1], ["»", "last page", far]];
  for (const pager of document.querySelectorAll(".pager"))
    pager.append(...steps.map((step, i) => {
      if (step === null) return el("output");
      const button = el("button", { type: "button", "aria-label": step[1] }, step[0]);
      button.backwards = step[2] < 0;
      button.addEventListener("click", () => {
        turn(state.page + step[2]);
        document.querySelector(".pager").children[i].focus({ preventScroll: true }); // the one that is in sight now
      });
      return button;
    }));
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
  const page = Math.floor(viewed / PAGE);
  if (page !== state.page) turn(page);
  find("gallery").children[viewed - page * PAGE].querySelector("button")?.focus({ preventScroll: page === state.page });
}

// --- controls ---
function option(value, text) {
  return el("option", { value }, text);
}

function drawControls() {
  find("sort").append(...levels.map((level, i) => option(`level-${i}`, `mIoU${level.number} of the photo`)),
    option("class", "IoU of the class"), option("violations", "violations"), option("id", "id"));
  find("level").append(option("glance", "at a glance"), option("all", "all levels"), ...levels.map((level, i) => option(i, `level ${level.number}: ${level.name}`)));
  find("class").append(option("", "any"));
  const seen = new Set();
  for (const level of levels) {
    const fresh = levelNodes(level).filter((node) => !seen.has(node.id));
    fresh.forEach((node) => seen.add(node.id));
    if (fresh.length) find("class").append(el("optgroup", { label: level.name }, ...fresh.map((node) => option(node.id, node.name))));
  }
  for (const name of ["sort", "order", "class", "where", "search", "level"]) {
    find(name).value = state[name];
    find(name).addEventListener("input", () => {
      state[name] = find(name).value;
      enableControls();
      choose();
    });
  }
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  enableControls();
}

/** Without a class there is nothing to say about where it is, and no IoU of it to sort by. */
function enableControls() {
  const isAny = state.class === "";
  find("where").disabled = isAny;
  find("sort").querySelector("[value=class]").disabled = isAny;
  if (isAny && state.sort === "class") find("sort").value = state.sort = "level-0";
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
  else turn(state.page + step);
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
  find("share").addEventListener("change", drawConfusion);
}

drawHead();
find("score-tables").append(...levels.map(scoreTable));
drawRules();
drawConfusion();
drawLegend(find("legend"));
drawLegend(find("viewer-legend"));
drawPagers();
drawControls();
drawDetails();
listen();
choose();
