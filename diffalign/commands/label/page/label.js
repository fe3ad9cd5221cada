"use strict";

const $ = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", "=": "equal", 0: "bad", s: "skip" };
const SAID = { left: "image 1 is better", right: "image 2 is better", equal: "equal", bad: "both bad", skip: "skipped" };
const RETRY = 1000; // milliseconds
const STEP = 1.5; // of the zoom

const state = { rater: null, pairs: [], done: 0, total: 0, shown: null, busy: false, times: [] };
const pictures = new Map(); // token -> promise of object URLs: left, right, and the source of an edit
const clock = { spent: 0, since: null }; // the time that the pair was visible

// Per tab, so that two raters may share a browser.
const store = (name, value) => {
  try {
    if (value !== undefined) sessionStorage.setItem(name, value);
    return sessionStorage.getItem(name);
  } catch {
    return value ?? null;
  }
};

const secret = new URLSearchParams(location.hash.slice(1)).get("token");
if (secret) {
  store("token", secret);
  history.replaceState(null, "", location.pathname); // out of sight, and of screenshots
}
const token = store("token");
const headers = token ? { Authorization: `Bearer ${token}` } : {};

const wait = (time) => new Promise((go) => setTimeout(go, time));
const say = (text) => { $("status").textContent = text; };
const complain = (text) => { $("problem").textContent = text; };

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

// Repeats a request until the server answers: an answer that it received twice counts once.
async function request(path, body) {
  const options = body === undefined
    ? { headers }
    : { method: "POST", headers: { ...headers, "Content-Type": "application/json" }, body: JSON.stringify(body) };
  for (;;) {
    let reply;
    try {
      reply = await fetch(path, options);
    } catch {
      complain("No connection to diffalign label. What you answered is kept here, and sent when it is back.");
      await wait(RETRY);
      continue;
    }
    complain("");
    if (reply.ok) return reply;
    const text = await reply.json().then((found) => found.error, () => reply.statusText);
    throw new Refused(reply.status, text);
  }
}

async function load(shown) {
  if (!pictures.has(shown.token)) {
    const side = async (name) => URL.createObjectURL(await (await request(`/picture/${shown.token}/${name}`)).blob());
    const names = ["left", "right", ...(shown.source ? ["source"] : [])];
    pictures.set(shown.token, Promise.all(names.map(side)));
  }
  return pictures.get(shown.token);
}

function forget() {
  const kept = new Set(state.pairs.map((shown) => shown.token));
  for (const [name, urls] of pictures) {
    if (kept.has(name)) continue;
    pictures.delete(name);
    urls.then((found) => found.forEach((url) => URL.revokeObjectURL(url)), () => {});
  }
}

const start = () => { clock.spent = 0; clock.since = document.hidden ? null : performance.now(); };
const elapsed = () => (clock.spent + (clock.since === null ? 0 : performance.now() - clock.since)) / 1000;
document.addEventListener("visibilitychange", () => {
  if (document.hidden && clock.since !== null) {
    clock.spent += performance.now() - clock.since;
    clock.since = null;
  } else if (!document.hidden && clock.since === null) {
    clock.since = performance.now();
  }
});

function take(reply) {
  Object.assign(state, { rater: reply.rater, pairs: reply.pairs, done: reply.done, total: reply.total });
  const left = state.total - state.done;
  $("count").textContent = `${state.done} of ${state.total}`;
  const recent = state.times.slice(-20);
  const pace = recent.reduce((sum, time) => sum + time, 0) / recent.length;
  const minutes = Math.ceil((pace * left) / 60);
  $("pace").textContent = recent.length ? `· ${pace.toFixed(1)} s each, ${minutes} min left` : "";
  Object.assign($("progress"), { value: state.done, max: Math.max(state.total, 1) });
  forget();
}

async function show() {
  const shown = state.pairs[0];
  $("login").hidden = true;
  for (const name of ["progress", "progress-text", "choices"]) $(name).hidden = false;
  $("work").hidden = !shown;
  $("end").hidden = Boolean(shown);
  for (const button of document.querySelectorAll("#choices [data-pick], #zoom")) button.hidden = !shown;
  if (!shown) {
    state.shown = null;
    $("box").close();
    $("thanks").textContent = state.total
      ? `All ${state.total} pairs are answered. Thank you, ${state.rater}.`
      : "There is no pair that can be shown.";
    $("thanks").focus();
    return;
  }
  $("work").setAttribute("aria-busy", "true");
  $("prompt").textContent = shown.prompt;
  let urls;
  try {
    urls = await load(shown);
  } catch (error) {
    pictures.delete(shown.token);
    if (error.status !== 410) throw error;
    say(error.message);
    take(await (await request("/api/next", { rater: state.rater })).json());
    await show();
    return;
  }
  await Promise.all(["left", "right"].map(async (side, index) => {
    for (const name of [side, `${side}-large`]) $(name).src = urls[index];
    await $(side).decode().catch(() => {});
  }));
  $("source-view").hidden = $("source-pane").hidden = !shown.source;
  if (shown.source) {
    for (const name of ["source", "source-large"]) $(name).src = urls[2];
    await $("source").decode().catch(() => {});
  }
  for (const picture of document.querySelectorAll(".picture")) picture.classList.remove("chosen");
  $("work").setAttribute("aria-busy", "false");
  state.shown = shown;
  if ($("box").open) resize();
  start();
  if (!$("box").open && !document.activeElement?.closest("#choices, #pair")) $("prompt").focus();
  for (const next of state.pairs.slice(1)) load(next).catch(() => {});
}

// One thing at a time: keys that are pressed meanwhile are ignored.
async function exclusively(work) {
  if (state.busy) return;
  state.busy = true;
  try {
    await work();
  } catch (error) {
    complain(error.message);
    if (error.status === 409) {
      take(await (await request("/api/next", { rater: state.rater })).json());
      await show();
    }
  } finally {
    state.busy = false;
  }
}

const answer = (pick) => exclusively(async () => {
  const shown = state.shown;
  if (!shown || shown.token !== state.pairs[0]?.token) return;
  const seconds = Math.min(elapsed(), 86400);
  document.querySelector(`.picture[data-pick="${pick}"]`)?.classList.add("chosen");
  const body = { rater: state.rater, token: shown.token, pick, seconds };
  const reply = await (await request("/api/answer", body)).json();
  if (reply.saved) state.times.push(seconds);
  state.shown = null;
  take(reply);
  say(reply.saved ? `Saved: ${SAID[pick]}. ${state.done} of ${state.total}.` : "This pair was answered already.");
  await show();
});

const undo = () => exclusively(async () => {
  const reply = await (await request("/api/undo", { rater: state.rater })).json();
  if (reply.undone) state.times.pop();
  take(reply);
  say(reply.undone ? "Undone: answer this pair again." : "There is nothing to undo.");
  await show();
});

function resize(step = 0) {
  const images = ["left-large", "right-large"].map($);
  const pane = images[0].parentElement;
  const fit = Math.min(...images.map((i) => Math.min(pane.clientWidth / i.naturalWidth, pane.clientHeight / i.naturalHeight)));
  const least = Math.min(fit, 1);
  state.scale = step === 0 ? Math.max(fit, 1) : Math.max(least, Math.min(32, state.scale * STEP ** step));
  for (const image of images) image.width = Math.floor(image.naturalWidth * state.scale);
  $("source-large").width = images[0].width;
  $("scale").textContent = `${Math.round(state.scale * 100)} %`;
}

function zoom() {
  if ($("box").open) { $("box").close(); return; }
  if (!state.shown) return;
  $("box").showModal();
  resize();
  $("left-large").parentElement.focus();
}

// All images show the same part. A pane that follows has a scroll event too, a frame later, when the other may have
// moved on.
const panes = [...document.querySelectorAll(".pane")], followed = new WeakMap();
const position = (pane) => `${pane.scrollLeft} ${pane.scrollTop}`;
for (const pane of panes) pane.addEventListener("scroll", () => {
  if (followed.get(pane) === position(pane)) return;
  followed.delete(pane);
  for (const other of panes) {
    if (other === pane) continue;
    other.scrollTo(pane.scrollLeft, pane.scrollTop);
    followed.set(other, position(other));
  }
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat && !event.key.startsWith("Arrow")) return;
  if (event.target.closest?.("input") || $("choices").hidden) return;
  const zoomed = $("box").open;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (zoomed && (key === "+" || key === "-")) resize(key === "+" ? 1 : -1);
  else if (key === "z") zoom();
  else if (zoomed && key.startsWith("Arrow")) return; // moves what is seen of the images
  else if (event.repeat) return;
  else if (key === "u") undo();
  else if (key in KEYS) answer(KEYS[key]);
  else return;
  event.preventDefault();
});

document.addEventListener("click", (event) => {
  const pick = event.target.closest?.("[data-pick]");
  if (pick) answer(pick.dataset.pick);
});
$("undo").addEventListener("click", undo);
$("zoom").addEventListener("click", zoom);
$("close").addEventListener("click", () => $("box").close());
$("smaller").addEventListener("click", () => resize(-1));
$("larger").addEventListener("click", () => resize(1));

const enter = (name) => exclusively(async () => {
  take(await (await request("/api/next", { rater: name })).json());
  store("rater", state.rater);
  await show();
});
$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  enter($("name").value);
});

if (store("rater")) enter(store("rater"));
else { $("login").hidden = false; $("name").focus(); }
