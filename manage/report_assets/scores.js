"use strict";
// Every text reaches the page as a text node or attribute, never as HTML: names and ids may hold anything.

const report = JSON.parse(document.getElementById("data").textContent);
const { scores, photos } = report;
const nodes = scores.tree.nodes;
const levels = scores.levels.map((level, i) => ({ ...level, number: i + 1, table: report.tables[i] }));
const PAGE = 24, KEPT = 72; // photos a page, and photos whose maps are kept
const VOID = [110, 110, 110], RIGHT_BACKGROUND = [246, 246, 246], RIGHT = [159, 211, 199], WRONG = [179, 38, 30];
const HEAT = [[10, 4, 40], [255, 236, 130]]; // dark to bright: reads in grey too

const BACKGROUND = nodes.filter((node) => node.background).map((node) => node.name);
const find = (id) => document.getElementById(id);
const isNode = (value) => value < nodes.length;
const percent = (value, digits = 1) => (value === null || value === undefined ? "–" : (100 * value).toFixed(digits));
const share = (value, digits) => `${percent(value, digits)}\u00a0%`; // never broken before its sign
const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
const ratio = (part, whole) => (whole ? part / whole : null);
const sum = (values) => values.reduce((total, value) => total + value, 0);

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function swatch(colour) {
  const box = el("span", { class: "swatch" });
  box.style.background = css(colour);
  return box;
}

function path(id) {
  const names = [];
  for (let node = nodes[id]; node; node = node.parent === null ? null : nodes[node.parent]) names.unshift(node.name);
  return names;
}

// --- scores ---
function drawHead() {
  find("title").textContent = report.title;
  const bias = Object.entries(scores.root_bias).map(([root, offset]) => ` ${root} ${offset}`);
  const tta = scores.tta && scores.tta !== "off" ? ` · test-time augmentation ${scores.tta}` : "";
  find("subtitle").textContent =
    `epoch ${scores.epoch} · ${photos.length.toLocaleString("en")} photos · decoded by ${scores.decode}` +
    (bias.length ? ` · root bias${bias}` : "") + `${tta} · tree ${scores.tree.name} · ${scores.environment.time}`;
  const files = ["scores.csv", "scores.json", ...(report.curves ? [report.curves] : [])];
  const links = files.map((file) => el("a", { href: file }, file.split("/").at(-1)));
  find("files").append(...links.flatMap((link) => [link, " · "]), `curves: tensorboard --logdir tensorboard/${scores.config.exp_name}`);
  const totals = levels.map((level) => [`mIoU${level.number} · ${level.name}`, level.mIoU]);
  const others = Object.entries(scores.scores).filter(([name]) => !name.startsWith("mIoU"));
  totals.push(...others.map(([name, value]) => [name.replaceAll("_", " "), value]));
  for (const [name, value] of totals)
    find("totals").append(el("div", { class: "total" }, el("b", {}, shown(name, value)), el("span", {}, name)));
  if (BACKGROUND.length) find("mean-note").textContent = `The mean leaves ${BACKGROUND.join(", ")} out.`;
}

/** A share in percent; the mistake severity is a height in the tree. */
function shown(name, value) {
  if (name.startsWith("mistake")) return value === null ? "–" : value.toFixed(3);
  return share(value, 2);
}

function levelNodes(level) {
  return level.classes.map((name) => nodes.find((node) => node.name === name));
}

function scoreTable(level) {
  const head = el("tr", {}, el("th", {}, "class"), ...["", "IoU", "precision", "recall", "share"].map((name) => el("th", { class: name }, name)));
  const body = el("tbody");
  levelNodes(level).forEach((node, i) => {
    const iou = level.IoU[node.name], hits = level.confusion[i][i];
    const truth = sum(level.confusion[i]), predicted = sum(level.confusion.map((row) => row[i]));
    const bar = el("i");
    bar.style.width = `${100 * (iou ?? 0)}%`;
    bar.style.background = css(node.colour);
    const numbers = [iou, ratio(hits, predicted), ratio(hits, truth), ratio(truth, level.pixels)];
    body.append(el("tr", {}, el("th", {}, swatch(node.colour), node.name), el("td", { class: "bar" }, bar),
      ...numbers.map((value, i) => el("td", { class: `number ${i === 3 ? "share" : ""}` }, percent(value)))));
  });
  const means = [["mean", level.mIoU, "mean"], ["with background", level.mIoU_with_background, ""]];
  for (const [name, value, kind] of BACKGROUND.length ? means : means.slice(0, 1))
    body.append(el("tr", { class: kind }, el("th", { colspan: 2 }, name), el("td", { class: "number" }, percent(value)),
      el("td", { colspan: 3 })));
  return el("div", { class: "panel" }, el("h3", {}, `Level ${level.number}: ${level.name}`),
    el("table", { class: "scores" }, el("thead", {}, head), body));
}

function drawRules() {
  const rules = Object.entries(scores.rules);
  if (rules.length < 2) return;
  const columns = Object.keys(rules[0][1]).filter((name) => !name.endsWith("_with_background"));
  const body = rules.map(([rule, values]) =>
    el("tr", {}, el("th", {}, rule), ...columns.map((name) => el("td", { class: "number" }, shown(name, values[name])))));
  find("rules").append(el("h3", {}, "Decoding rules"), el("div", { class: "panel" }, el("table", { class: "scores" },
    el("thead", {}, el("tr", {}, el("th", {}, ""), ...columns.map((name) => el("th", {}, name.replaceAll("_", " "))))), el("tbody", {}, ...body))));
}

// --- confusion ---
function confusionTable(level, share) {
  const members = levelNodes(level);
  const columns = members.map((_, j) => sum(level.confusion.map((row) => row[j])));
  const rows = level.confusion.map((row, i) => {
    const cells = row.map((count, j) => {
      const value = ratio(count, share === "row" ? sum(row) : columns[j]);
      const cell = el("td", { title: `${members[i].name} predicted as ${members[j].name}: ${count.toLocaleString("en")} pixels` },
        value === null ? "–" : percent(value, value < 0.1 ? 1 : 0));
      cell.style.background = `rgb(11 98 164 / ${Math.round(100 * (value ?? 0))}%)`;
      cell.style.color = value > 0.55 ? "#fff" : "inherit";
      return cell;
    });
    return el("tr", {}, el("th", {}, swatch(members[i].colour), members[i].name), ...cells);
  });
  const head = members.map((node) => el("th", {}, el("span", {}, node.name)));
  return el("div", { class: "panel" }, el("h3", {}, `Level ${level.number}: ${level.name}`),
    el("table", { class: "confusion" }, el("thead", {}, el("tr", {}, el("th"), ...head)), el("tbody", {}, ...rows)));
}

function drawConfusion() {
  find("confusion-tables").replaceChildren(...levels.map((level) => confusionTable(level, find("share").value)));
}
