"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const make = (tag, text = "", kind = "") => Object.assign(document.createElement(tag), { textContent: text, className: kind });
const finite = v => v !== null && v !== undefined;
const number = v => finite(v) ? Number(v.toPrecision(3)).toString().replace("-", "−") : "–";
const signed = v => (v > 0 ? "+" : "") + number(v);
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// Columns: the source image of an edit (model -1), then the models. A cell is (row, column).
const edits = data.rows.some(row => row.source);
const columns = [...(edits ? [{ name: "source", model: -1 }] : []), ...data.models.map((name, model) => ({ name, model }))];
const firstModel = edits ? 1 : 0;
const image = (row, column) => columns[column].model < 0 ? row.source : row.images[columns[column].model];
const size = (row, column) => row.sizes[Math.max(0, columns[column].model)];
const score = (row, model, reward) => row.scores[model][reward];
const gain = (row, model, reward) => {
  const now = score(row, model, reward), before = score(row, 0, reward);
  return finite(now) && finite(before) ? now - before : null;
};

const gainText = value => value ? [make("span", signed(value), value > 0 ? "better" : "worse")] : [];

function picture(row, column) {
  const found = make("img"), [width, height] = size(row, column);
  Object.assign(found, { src: image(row, column), alt: `${columns[column].name}: ${row.prompt}`, width, height });
  if (data.small) found.className = "small";
  return found;
}

// ---- means

function meansTable(title, means, scored, images) {
  const part = make("div", "", "means"), box = make("div", "", "scroll"), table = make("table"), head = make("tr"), body = make("tbody");
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", title);
  table.append(make("thead"), body);
  const th = (text, scope) => Object.assign(make("th", text), { scope });
  head.append(th("", "col"), ...data.rewards.map(name => th(name, "col")));
  table.tHead.append(head);
  data.models.forEach((name, m) => {
    const line = make("tr");
    line.append(th(name, "row"), ...data.rewards.map((_, r) => {
      const cell = make("td", number(means[m][r])), more = make("small");
      if (m && finite(means[m][r]) && finite(means[0][r])) more.append(...gainText(means[m][r] - means[0][r]));
      if (scored[m][r] < images) more.append(` ${scored[m][r]} of ${images} scored`);
      if (more.childNodes.length) cell.append(" ", more);
      return cell;
    }));
    body.append(line);
  });
  box.append(table);
  part.append(make("p", title), box);
  return part;
}

function showMeans() {
  const lists = data.models.map((_, m) => data.rewards.map((_, r) => shown.map(i => score(data.rows[i], m, r)).filter(finite)));
  const means = lists.map(own => own.map(list => list.length ? list.reduce((a, b) => a + b, 0) / list.length : null));
  const part = shown.length < data.rows.length ? "found" : data.all ? "shown" : "";
  const title = `Mean over ${plural(shown.length, "image")}${part && ` ${part}`}, 1 per prompt`;
  const tables = [meansTable(title, means, lists.map(own => own.map(list => list.length)), shown.length)];
  if (data.all) {
    const whole = `Mean over all ${data.all.images} images, ${data.all.each} per prompt`;
    tables.push(meansTable(whole, data.all.means, data.all.scored, data.all.images));
  }
  by("means").replaceChildren(...tables);
}

// ---- grid

function scores(row, column) {
  const list = make("dl", "", "scores"), m = columns[column].model;
  if (m >= 0) data.rewards.forEach((reward, r) => {
    const line = make("div"), name = make("dt", reward), value = make("dd", number(score(row, m, r)));
    name.title = reward;
    if (m) value.append(" ", ...gainText(gain(row, m, r)));
    line.append(name, value);
    list.append(line);
  });
  return list.childNodes.length ? [list] : [];
}

function cell(row, number, column) {
  const found = make("div"), button = make("button", "", "picture"), name = make("div", columns[column].name, "name");
  found.setAttribute("role", "gridcell");
  Object.assign(button, { type: "button", tabIndex: -1 });
  button.append(Object.assign(picture(row, column), { loading: "lazy" }));
  button.addEventListener("click", () => { stop([number, column]); open(); });
  button.addEventListener("focus", () => { stop([number, column]); });
  name.setAttribute("aria-hidden", "true");
  found.append(name, button, ...scores(row, column));
  return found;
}

const cards = data.rows.map((row, number) => {
  const card = make("div", "", "card"), head = make("div", "", "prompt"), text = make("p", row.prompt), cells = make("div", "", "cells");
  card.setAttribute("role", "row");
  head.setAttribute("role", "rowheader");
  text.dir = "auto";
  head.append(text);
  if (row.task) head.append(make("small", row.task));
  cells.append(...columns.map((_, column) => cell(row, number, column)));
  card.append(head, cells);
  return card;
});

const buttonAt = ([row, column]) => cards[row].querySelectorAll(".picture")[column];
let shown = [];  // indices of the rows that pass the filters, in order
let place = [0, firstModel];  // row and column of the focus; the only tab stop of the grid
function stop(next) {
  buttonAt(place).tabIndex = -1;
  place = next;
  buttonAt(place).tabIndex = 0;
}

function show() {
  const task = by("task").value, words = by("find").value.toLowerCase(), sort = by("sort").value;
  shown = data.rows.map((_, i) => i).filter(i =>
    (task === "all" || data.rows[i].task === task) && data.rows[i].prompt.toLowerCase().includes(words));
  if (sort !== "order") {
    const [m, r, sign] = sort.split(",").map(Number);
    const key = i => { const g = gain(data.rows[i], m, r); return g === null ? Infinity : sign * g; };
    shown.sort((a, b) => key(a) - key(b) || a - b);
  }
  by("rows").replaceChildren(...shown.map(i => cards[i]));
  by("count").textContent = `${shown.length} of ${plural(data.rows.length, "prompt")}`;
  if (shown.length) stop(shown.includes(place[0]) ? place : [shown[0], firstModel]);
  showMeans();
  layout();
}

// As many prompts side by side as leave each picture about 200 pixels; on narrow screens the pictures of a prompt wrap.
function layout() {
  const width = by("rows").clientWidth, count = columns.length, aligned = count * 105 + (count - 1) * 12 <= width;
  const prompts = aligned ? Math.max(1, Math.min(Math.floor((width + 28) / (count * 200 + 28)), data.rows.length)) : 1;
  const style = document.documentElement.style;
  style.setProperty("--cards", prompts);
  style.setProperty("--columns", aligned ? count : Math.max(2, Math.floor(width / 150)));
  style.setProperty("--top", getComputedStyle(by("bar")).position === "sticky" ? `${by("bar").offsetHeight}px` : "0px");
  by("rows").classList.toggle("aligned", aligned);
  by("heads").hidden = !aligned || !shown.length;
  by("heads").replaceChildren(...Array.from({ length: Math.min(prompts, shown.length) }, () => {
    const group = make("div");
    group.append(...columns.map(({ name }) => Object.assign(make("span", name), { title: name })));
    return group;
  }));
  for (const i of shown) unfold(cards[i].querySelector(".prompt"));
}

// A prompt of more than four lines is cut, with a button that shows the rest.
function unfold(head) {
  const text = head.querySelector("p"), cut = text.scrollHeight > text.clientHeight + 1;
  if (!cut || head.querySelector("button")) return;
  const button = make("button", "Show all");
  button.type = "button";
  button.setAttribute("aria-label", `Show all of the prompt: ${text.textContent.slice(0, 60)}…`);
  button.addEventListener("click", () => { head.classList.add("whole"); button.remove(); });
  text.after(button);
}

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

// Move by models and prompts; past the last model of a prompt comes the first of the next. Null at an end.
function moved([row, column], [down, right], across = 1) {
  let at = shown.indexOf(row) + down * across, next = column + right;
  if (next < 0 || next >= columns.length) {
    at += right;
    next = right < 0 ? columns.length - 1 : 0;
  }
  return at >= 0 && at < shown.length ? [shown[at], next] : null;
}

by("rows").addEventListener("keydown", event => {
  if (!event.target.classList.contains("picture") || event.altKey || event.metaKey || event.shiftKey) return;
  let next = null;
  if (event.key in ARROWS && !event.ctrlKey) {
    next = moved(place, ARROWS[event.key], Number(document.documentElement.style.getPropertyValue("--cards")));
  } else if (event.key === "Home") next = [event.ctrlKey ? shown[0] : place[0], 0];
  else if (event.key === "End") next = [event.ctrlKey ? shown[shown.length - 1] : place[0], columns.length - 1];
  else return;
  event.preventDefault();
  if (next) buttonAt(next).focus();
});

// ---- enlarged

let view = "side", zoom = 1, against = firstModel, at = 50;
let seen = place;  // closing gives the focus back to where the view was opened, before it can be moved here

function open() {
  zoom = 1;
  by("box").showModal();
  draw();
  by("caption").focus();
}

function facts(column) {
  const row = data.rows[place[0]], m = columns[column].model;
  if (m < 0) return "";
  return data.rewards.map((name, r) => {
    const g = m ? gain(row, m, r) : null;
    return `${name} ${number(score(row, m, r))}${g ? ` (${signed(g)})` : ""}`;
  }).join(", ");
}

function figure(column) {
  const row = data.rows[place[0]], found = make("figure"), pane = make("div", "", "pane"), caption = make("figcaption");
  pane.append(picture(row, column));
  caption.append(make("strong", columns[column].name), " ", facts(column));
  if (view === "side") {
    found.classList.toggle("current", column === place[1]);
    pane.addEventListener("click", () => { stop([place[0], column]); see("one"); });
  } else pane.addEventListener("click", () => enlarge(zoom > 1 ? 1 / zoom : 2));
  found.append(pane, caption);
  return found;
}

function other() {
  return against !== place[1] ? against : columns.findIndex((_, column) => column !== place[1]);
}

function slider() {
  const row = data.rows[place[0]], found = make("figure"), pane = make("div", "", "pane"), box = make("div", "", "slider");
  const range = Object.assign(make("input"), { type: "range", min: 0, max: 100, step: 1, value: at });
  const [left, right] = [other(), place[1]], ends = make("figcaption", "", "ends");
  const move = () => {
    at = Number(range.value);
    box.style.setProperty("--at", `${at}%`);
    range.setAttribute("aria-valuetext", `${at} % ${columns[left].name}, ${100 - at} % ${columns[right].name}`);
  };
  range.setAttribute("aria-label", `Divider between ${columns[left].name} and ${columns[right].name}`);
  range.addEventListener("input", move);
  move();
  box.append(picture(row, left), picture(row, right), range);
  pane.append(box);
  for (const column of [left, right]) {
    const end = make("span");
    end.append(make("strong", columns[column].name), " ", facts(column));
    ends.append(end);
  }
  found.append(pane, ends);
  return found;
}

function draw() {
  const row = data.rows[place[0]], focused = document.activeElement;
  const divider = focused && focused.type === "range";
  seen = place;
  by("caption").textContent = row.prompt;
  for (const button of document.querySelectorAll("[data-view]")) {
    button.setAttribute("aria-pressed", button.dataset.view === view);
    button.hidden = columns.length < 2 && button.dataset.view !== "one";
  }
  by("pair").hidden = view !== "slider";
  if (view === "slider") [by("left").value, by("right").value] = [other(), place[1]];
  by("stage").replaceChildren(...(view === "side" ? columns.map((_, column) => figure(column))
    : [view === "one" ? figure(place[1]) : slider()]));
  if (divider && view === "slider") by("stage").querySelector("input").focus();
  else if (!by("box").contains(document.activeElement)) by("caption").focus();  // its element was replaced
  fit();
  by("previous-model").disabled = !moved(place, [0, -1]);
  by("next-model").disabled = !moved(place, [0, 1]);
  by("previous-prompt").disabled = !moved(place, [-1, 0]);
  by("next-prompt").disabled = !moved(place, [1, 0]);
  say();
}

function say() {
  const what = view === "slider" ? `${columns[other()].name} against ${columns[place[1]].name}` : columns[place[1]].name;
  by("said").textContent = `${what}, prompt ${shown.indexOf(place[0]) + 1} of ${shown.length}`
    + (zoom > 1 ? `, ${Number(zoom.toFixed(2))} times` : "");
}

// Size the panes so that all of them are in view, in the number of columns that shows them largest.
function fit() {
  const stage = by("stage"), figures = [...stage.children], row = data.rows[place[0]];
  const shapes = figures.map((_, i) => size(row, view === "side" ? i : place[1]));
  const ratio = Math.max(...shapes.map(([w, h]) => h / w)), space = [stage.clientWidth, stage.clientHeight];
  let width = 0;
  for (let count = 1; count <= figures.length; count += 1) {
    const across = (space[0] - 16 * (count - 1) - 8) / count, lines = Math.ceil(figures.length / count);
    const measured = figures.map(f => { f.style.width = `${across}px`; return f.lastChild.offsetHeight; });
    const down = (space[1] - 8 * (lines - 1) - 8) / lines - Math.max(...measured);
    width = Math.max(width, Math.min(across, down / ratio));
  }
  width = Math.max(60, Math.floor(width));
  figures.forEach((found, i) => {
    const pane = found.firstChild, inner = pane.firstChild, height = width * shapes[i][1] / shapes[i][0];
    found.style.width = pane.style.width = `${width}px`;
    pane.style.height = `${height}px`;
    inner.style.width = `${width * zoom}px`;
    inner.style.height = `${height * zoom}px`;
    // Only a pane that scrolls is a tab stop, in which arrows scroll.
    if (zoom > 1) {
      const ariaLabel = `${columns[view === "side" ? i : place[1]].name}, enlarged`;
      Object.assign(pane, { tabIndex: 0, role: "group", ariaLabel });
    }
    pane.onscroll = () => together(pane);
  });
  by("smaller").disabled = by("fit").disabled = zoom <= 1;
  by("larger").disabled = zoom >= 16;
}

// A pane that follows another has a scroll event too, a frame later, when the other may have moved on.
const followed = new WeakMap(), position = pane => `${pane.scrollLeft} ${pane.scrollTop}`;
function together(moving) {
  if (!moving.isConnected || followed.get(moving) === position(moving)) return;  // replaced, or one that follows
  followed.delete(moving);
  for (const pane of document.querySelectorAll(".pane")) {
    if (pane === moving) continue;
    Object.assign(pane, { scrollLeft: moving.scrollLeft, scrollTop: moving.scrollTop });
    followed.set(pane, position(pane));
  }
}

function enlarge(factor) {
  const pane = by("stage").querySelector(".pane"), middle = [pane.clientWidth / 2, pane.clientHeight / 2];
  const before = [pane.scrollLeft + middle[0], pane.scrollTop + middle[1]], old = zoom;
  zoom = Math.min(16, Math.max(1, zoom * factor));
  draw();
  const next = by("stage").querySelector(".pane");
  next.scrollTo(before[0] * zoom / old - middle[0], before[1] * zoom / old - middle[1]);
}

function go(step) {
  const next = moved(place, step), from = by("stage").querySelector(".pane"), scroll = [from.scrollLeft, from.scrollTop];
  if (!next) return;
  stop(next);
  draw();
  by("stage").querySelector(".pane").scrollTo(...scroll);
}

function see(name) {
  view = name;
  draw();
  if (view === "slider") by("stage").querySelector("input").focus();
}

by("box").addEventListener("keydown", event => {
  const { target, key } = event;
  const held = event.altKey || event.ctrlKey || event.metaKey || event.shiftKey && key in ARROWS;
  if (held || target.tagName === "SELECT") return;
  const own = target.type === "range" && (key === "ArrowLeft" || key === "ArrowRight") || target.classList.contains("pane");
  if (key in ARROWS && !own) go(ARROWS[key]);
  else if (key === "+" || key === "=") enlarge(1.5);
  else if (key === "-") enlarge(1 / 1.5);
  else if (key === "0") enlarge(1 / zoom);
  else return;
  event.preventDefault();
});
by("box").addEventListener("close", () => buttonAt(seen).focus());
by("close").addEventListener("click", () => by("box").close());
by("smaller").addEventListener("click", () => enlarge(1 / 1.5));
by("larger").addEventListener("click", () => enlarge(1.5));
by("fit").addEventListener("click", () => enlarge(1 / zoom));
for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => see(button.dataset.view));
const STEPS = { "previous-model": [0, -1], "next-model": [0, 1], "previous-prompt": [-1, 0], "next-prompt": [1, 0] };
for (const [id, step] of Object.entries(STEPS)) by(id).addEventListener("click", () => go(step));
// The two sides change places where one is set to the other.
by("left").addEventListener("change", () => {
  const before = other();
  against = Number(by("left").value);
  if (against === place[1]) stop([place[0], before]);
  draw();
});
by("right").addEventListener("change", () => {
  const chosen = Number(by("right").value);
  if (chosen === other()) against = place[1];
  stop([place[0], chosen]);
  draw();
});

// ---- start

by("title").textContent = document.title = data.title;
const tasks = [...new Set(data.rows.map(r => r.task).filter(t => t))];
for (const t of ["all", ...tasks]) by("task").append(new Option(t, t));
by("task").parentElement.hidden = tasks.length < 2;
by("sort").append(new Option("order of the file", "order"));
data.rewards.forEach((reward, r) => data.models.forEach((model, m) => {
  if (m > 0) {
    by("sort").append(new Option(`gain of ${model} in ${reward}`, `${m},${r},-1`));
    by("sort").append(new Option(`loss of ${model} in ${reward}`, `${m},${r},1`));
  }
}));
by("sort").parentElement.hidden = data.models.length < 2;
columns.forEach(({ name }, column) => { for (const id of ["left", "right"]) by(id).append(new Option(name, column)); });
if (columns.length < 2) view = "one";
by("note").textContent = "Numbers below a picture are its own scores"
  + (data.models.length > 1 ? `; + and − are the difference from ${data.models[0]}` : "")
  + ". Arrow keys move between pictures, Enter enlarges, Escape closes.";

by("filters").addEventListener("submit", event => event.preventDefault());
for (const id of ["task", "sort"]) by(id).addEventListener("change", show);
by("find").addEventListener("input", show);
new ResizeObserver(layout).observe(document.body);
new ResizeObserver(() => { if (by("box").open) fit(); }).observe(by("box"));
show();
