// The page of `quill serve`: writes with models, looks inside them, and shows their cards.
// Text of models, prompts, names and errors enters the page as text nodes only.

import { card } from "./card.js";
import { count, h, mount } from "./explain.js";
import { programs } from "./programs.js";
import { Alternatives, Sample, copyText, flash, legend, write } from "./samples.js";
import { ask } from "./server.js";
import { Settings, fromLink, sampling, toLink } from "./settings.js";

const $ = (id) => document.getElementById(id);
const VIEWS = ["write", "inside", "card"];
const NARROW = matchMedia("(max-width: 56rem)");
// Milliseconds after which a wait is explained.
const PATIENCE = 400;

const state = fromLink(location.hash);
let models = [];
let running = null;
let used = null;
let explained = "";
const made = programs(state);

const say = (text) => { $("status").textContent = text; };
const find = (id) => models.find((model) => model.id === id);
const nameOf = (id) => id.replace(/:v\d+$/, "");
const message = (error) => h("p", { class: "message", role: "alert" }, error.message ?? error);

// Settings and the link

const settings = new Settings($("fields"), $("summary"), state, changed);

function changed() {
  history.replaceState(null, "", toLink(state));
  made.update();
}

/** Show the state of a link. */
function apply() {
  for (const field of ["prompt", "inside-prompt"]) $(field).value = state.prompt;
  settings.update();
  choose("model", "version", state.model);
  if (state.with) choose("other-model", "other-version", state.with);
  compare(Boolean(state.with));
  view(state.view);
}

async function share() {
  // The seed of the last text belongs to it, so that the same text comes out.
  const link = { ...state, seed: state.seed ?? used };
  history.replaceState(null, "", toLink(link));
  const copied = await copyText(location.href);
  flash($("share"), copied ? "Copied" : "It is in the address bar");
  say(copied ? "Link copied" : "The link is in the address bar");
}

// Models

function options(select, values, chosen, words = (value) => value) {
  select.replaceChildren(...values.map((value) => h("option", { value, selected: value === chosen }, words(value))));
}

/** Fill two lists, and choose a version in them. */
function choose(first, second, id) {
  const known = find(id) ?? models[0];
  const versions = models.filter((model) => nameOf(model.id) === nameOf(known.id)).map((model) => model.id);
  options($(first), [...new Set(models.map((model) => nameOf(model.id)))], nameOf(known.id));
  options($(second), versions, known.id, (value) => value.slice(nameOf(value).length + 1) || "only one");
  return known.id;
}

function listen(first, second, field) {
  const chosen = (id) => {
    state[field] = choose(first, second, id);
    changed();
    refresh();
  };
  $(first).addEventListener("change", () => chosen(models.find((model) => nameOf(model.id) === $(first).value).id));
  $(second).addEventListener("change", () => chosen($(second).value));
}

function compare(on) {
  $("second").hidden = !on;
  $("compare").setAttribute("aria-pressed", String(on));
  state.with = on ? choose("other-model", "other-version", state.with || (models.find((model) => model.id !== state.model) ?? models[0]).id) : "";
}

async function load() {
  const { data } = await ask("v1/models?versions=all");
  models = data.sort((a, b) => b.created - a.created || b.id.localeCompare(a.id, "en", { numeric: true }));
  if (!models.length) {
    $("trouble").replaceChildren(h("div", { class: "panel empty" }, h("h2", {}, "There are no models yet"),
      h("p", {}, "Train one from any text, then reload this page:"), h("pre", {}, "quill train notes.txt --name mine")));
    for (const part of ["write", "inside", "card"]) $(part).hidden = true;
    document.body.classList.add("bare");
    return;
  }
  // A link may name a model without its version.
  for (const field of ["model", "with"]) {
    const wanted = state[field];
    const found = find(wanted) ?? models.find((model) => nameOf(model.id) === wanted);
    if (wanted && !found) $("trouble").replaceChildren(message(`The link names the model ${wanted}, which is not on this server.`));
    state[field] = found?.id ?? (field === "model" ? models[0].id : "");
  }
  $("compare").hidden = models.length < 2;
  listen("model", "version", "model");
  listen("other-model", "other-version", "with");
  apply();
}

// Writing

function start() {
  $("results").replaceChildren(h("div", { class: "panel empty" },
    h("img", { src: "static/icon.svg", alt: "", width: 48, height: 48 }),
    h("h2", {}, "Nothing is written yet"),
    h("ol", {}, h("li", {}, "Choose a model at the top."), h("li", {}, "Type the start of a text, or none."),
      h("li", {}, "Press Generate. Then choose any token to see what else it could have been."))), made.element);
}

/** Run something that writes, with its progress shown and Stop at hand. */
async function busy(work) {
  running?.abort();
  const control = running = new AbortController();
  const began = performance.now();
  const waiting = setTimeout(() => { $("progress").textContent = "Waiting for the first token. A model is loaded when it is first used."; }, PATIENCE);
  const dirty = new Set();
  let tokens = 0;
  let first = null;
  const draw = () => {
    for (const sample of dirty) sample.draw();
    dirty.clear();
    if (running !== control) return;
    const seconds = (performance.now() - began) / 1000;
    $("progress").textContent = `${count(tokens)} tokens, ${count(Math.round(tokens / Math.max(seconds, 0.001)))} a second`;
  };
  $("progress").textContent = "";
  $("generate").setAttribute("aria-disabled", "true");
  $("stop").hidden = false;
  say("Writing");
  await work(control.signal, (sample, more) => {
    clearTimeout(waiting);
    first ??= performance.now();
    tokens += more;
    // The longer the texts, the longer it takes to lay them out.
    if (!dirty.size) setTimeout(() => requestAnimationFrame(draw), Math.min(tokens / 50, 500));
    dirty.add(sample);
  });
  clearTimeout(waiting);
  if (running !== control) return;
  running = null;
  const seconds = (performance.now() - began) / 1000;
  const speed = tokens > 1 ? `, ${count(Math.round(tokens / seconds))} a second, the first after ${Math.round(first - began)} ms` : "";
  $("progress").textContent = tokens ? `${count(tokens)} tokens in ${seconds.toFixed(1)} s${speed}` : "";
  $("generate").removeAttribute("aria-disabled");
  if (document.activeElement === $("stop")) $("generate").focus();
  $("stop").hidden = true;
  say(control.signal.aborted ? `Stopped after ${count(tokens)} tokens` : `Done, ${count(tokens)} tokens`);
}

const request = (model, seed) => ({ model, ...sampling(state), seed });
const newSeed = () => Math.floor(Math.random() * 2 ** 31);

async function generate() {
  await loaded;
  if (running || !models.length) return;
  alternatives.close();
  used = state.seed ?? newSeed();
  const seed = used;
  const chosen = [state.model, ...(state.with ? [state.with] : [])];
  const groups = chosen.map((id) => Array.from({ length: state.samples }, (_, i) => {
    const number = state.samples > 1 ? `Sample ${i + 1}` : "";
    const sample = new Sample(find(id), state.with || !number ? [id, number].filter(Boolean).join(": ") : number, { choose: (one, at) => alternatives.show(one, at), more, say });
    sample.running = true;
    sample.start(state.prompt, seed);
    return sample;
  }));
  // Next to each other: the same sample of both models, or all samples of one.
  const samples = groups[0].flatMap((_, i) => groups.map((group) => group[i]));
  const grid = h("div", { class: `samples ${groups.length > 1 ? "pairs" : ""}` }, samples.map((sample) => sample.element));
  $("results").replaceChildren(legend(), grid, made.element);
  await busy((signal, progress) => Promise.all(groups.map((group, i) =>
    write(group, { ...request(chosen[i], seed), prompt: state.prompt }, signal, progress))));
}

/** Write on at the end of a sample. */
async function more(sample) {
  if (running) return;
  await again(sample, state.length);
}

/** Write on from another token of a sample. */
async function branch(sample, at, other) {
  alternatives.close();
  running?.abort();
  const { length } = sample.take.tokens;
  sample.begin(sample.take.branch(at, other));
  sample.body.focus({ preventScroll: true });
  await again(sample, Math.max(length - at - 1, 1));
}

async function again(sample, most) {
  const { take, model } = sample;
  const body = { ...request(model.id, take.seed), max_tokens: most, prompt: take.ids(model.max_model_len) };
  await busy((signal, progress) => write([sample], body, signal, progress));
}

const alternatives = new Alternatives($("alternatives"), {
  branch,
  inside(sample, text) {
    alternatives.close();
    state.model = choose("model", "version", sample.model.id);
    state.prompt = text;
    $("prompt").value = $("inside-prompt").value = text;
    view("inside");
    $("tab-inside").focus();
  },
});

// Looking inside, and the card

async function look() {
  await loaded;
  const wanted = JSON.stringify([state.model, state.prompt, state.temperature, state.top_k, state.top_p]);
  if (wanted === explained) return;
  explained = wanted;
  const place = $("explanation");
  place.className = "";
  place.replaceChildren(h("p", { class: "panel waiting" }, "Following the prompt through the model"));
  const { temperature, top_k, top_p } = state;
  try {
    const found = await ask("v1/quill/explain", { body: { model: state.model, prompt: state.prompt, temperature, top_k, top_p } });
    if (explained === wanted) mount(place, found);
  } catch (error) {
    if (explained === wanted) place.replaceChildren(message(error));
    explained = "";
  }
}

async function cards() {
  const wanted = [state.model, state.with].filter(Boolean);
  const place = $("card");
  place.replaceChildren(...wanted.map(() => h("p", { class: "panel waiting" }, "Loading")));
  const found = await Promise.all(wanted.map((id) => ask(`v1/quill/card/${encodeURIComponent(id)}`).then(card, message)));
  if (wanted.join() === [state.model, state.with].filter(Boolean).join()) place.replaceChildren(...found);
}

// Views

function view(name) {
  state.view = VIEWS.includes(name) ? name : "write";
  alternatives.close();
  for (const one of VIEWS) {
    const on = one === state.view;
    $(one).hidden = !on;
    $(`tab-${one}`).setAttribute("aria-selected", String(on));
    $(`tab-${one}`).tabIndex = on ? 0 : -1;
  }
  changed();
  refresh();
}

function refresh() {
  if (!models.length) return;
  if (state.view === "inside") look();
  if (state.view === "card") cards();
}

$("compose").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("look").addEventListener("submit", (event) => { event.preventDefault(); look(); });
$("stop").addEventListener("click", () => running?.abort());
$("share").addEventListener("click", share);
$("compare").addEventListener("click", () => { compare(!state.with); changed(); refresh(); });
for (const [field, other] of [["prompt", "inside-prompt"], ["inside-prompt", "prompt"]]) {
  $(field).addEventListener("input", () => {
    state.prompt = $(other).value = $(field).value;
    changed();
  });
}
VIEWS.forEach((name, i) => {
  const tab = $(`tab-${name}`);
  tab.addEventListener("click", () => view(name));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: i + 2, ArrowRight: i + 1 }[event.key];
    if (to === undefined) return;
    const next = VIEWS[to % VIEWS.length];
    view(next);
    $(`tab-${next}`).focus();
  });
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (state.view === "inside") look();
    else if (state.view === "write") generate();
  } else if (event.key === "Escape" && running) {
    running.abort();
  }
});
addEventListener("hashchange", () => {
  Object.assign(state, fromLink(location.hash));
  state.model = find(state.model)?.id ?? models[0]?.id;
  state.with = find(state.with)?.id ?? "";
  if (models.length) apply();
});
if (/Mac|iPhone|iPad/.test(navigator.platform)) $("generate").querySelector("kbd").textContent = "⌘ ↵";
const fold = () => { $("settings").open = !NARROW.matches; };
NARROW.addEventListener("change", fold);
fold();
start();
const loaded = load().catch((error) => $("trouble").replaceChildren(message(error)));
