// What a text is written with: the fields, and the link that holds them.

import { h } from "./explain.js";

/** Every number that can be set. `off` is the end of the slider at which the setting does nothing. */
const FIELDS = [
  { name: "length", label: "Length", hint: "Most tokens to write.", min: 1, max: 1000, step: 1, value: 300, whole: true },
  { name: "temperature", label: "Temperature", hint: "Low is predictable, high is wild; 0 always takes the likeliest token.", min: 0, max: 2, step: 0.05, value: 0.8 },
  { name: "top_k", label: "Top-k", hint: "Draw only from the k likeliest tokens.", min: 0, max: 100, step: 1, off: 0, whole: true, more: true },
  { name: "top_p", label: "Top-p", hint: "Draw only from the likeliest tokens that add up to this share.", min: 0.05, max: 1, step: 0.05, off: 1, more: true },
  { name: "min_p", label: "Min-p", hint: "Skip tokens less likely than this share of the likeliest.", min: 0, max: 0.5, step: 0.01, off: 0, more: true },
];
const SEED = { name: "seed", label: "Seed", hint: "The same seed gives the same text.", min: 0, whole: true };
const MOST_SAMPLES = 4;
const NUMBERS = [...FIELDS, SEED, { name: "samples", value: 1, whole: true }];
const TEXTS = ["model", "with", "prompt", "view"];

/** The value of a field's text; null is off, undefined is no number that it takes. */
function parse(field, text) {
  if (text.trim() === "") return field.value === undefined ? null : undefined;
  const value = Number(text);
  if (!Number.isFinite(value) || value < field.min || (field.whole && !Number.isInteger(value))) return undefined;
  return value === field.off ? null : value;
}

/** The settings of a link; what it does not hold, or holds wrongly, is as at the start. */
export function fromLink(hash) {
  const found = new URLSearchParams(hash.replace(/^#/, ""));
  const state = { model: "", with: "", prompt: "", view: "write" };
  for (const name of TEXTS) state[name] = found.get(name) ?? state[name];
  for (const field of NUMBERS) {
    const value = found.has(field.name) ? parse(field, found.get(field.name)) : undefined;
    state[field.name] = value ?? field.value ?? null;
  }
  state.samples = Math.min(Math.max(state.samples, 1), MOST_SAMPLES);
  return state;
}

/** The link that holds the settings. */
export function toLink(state) {
  const made = new URLSearchParams();
  for (const name of TEXTS) if (state[name] && !(name === "view" && state.view === "write")) made.set(name, state[name]);
  for (const { name, value = null } of NUMBERS) if (state[name] !== value) made.set(name, state[name]);
  return `#${made}`;
}

/** The fields of a request. */
export function sampling({ length, temperature, top_k, top_p, min_p }) {
  return { max_tokens: length, temperature, top_k, top_p, min_p };
}

const said = (state) => [
  `${state.length} tokens`, `temperature ${state.temperature}`,
  ...FIELDS.filter(({ name, more }) => more && state[name] !== null).map(({ name, label }) => `${label.toLowerCase()} ${state[name]}`),
  state.samples > 1 ? `${state.samples} samples` : null,
].filter(Boolean).join(" · ");

/** The fields of the page. They write into `state` and call `change`. */
export class Settings {
  constructor(root, summary, state, change) {
    Object.assign(this, { summary, state, change, updates: [] });
    const more = h("details", { class: "more" }, h("summary", {}, "More settings"),
      FIELDS.filter((field) => field.more).map((field) => this.field(field)), this.seed());
    root.append(...FIELDS.filter((field) => !field.more).map((field) => this.field(field)), this.samples(), more);
    this.more = more;
    this.update();
  }

  /** Show the state. */
  update() {
    for (const update of this.updates) update();
    this.summary.textContent = said(this.state);
    if (FIELDS.some(({ name, more }) => more && this.state[name] !== null) || this.state.seed !== null) this.more.open = true;
  }

  set(name, value) {
    this.state[name] = value;
    this.summary.textContent = said(this.state);
    this.change();
  }

  number(field) {
    const input = h("input", {
      type: "number", id: field.name, min: field.min, step: field.whole ? 1 : "any", inputmode: field.whole ? "numeric" : "decimal",
      placeholder: "value" in field ? "" : field === SEED ? "random" : "off", "aria-describedby": `${field.name}-hint`,
    });
    input.addEventListener("input", () => {
      const value = input.validity.badInput ? undefined : parse(field, input.value);
      input.setAttribute("aria-invalid", String(value === undefined));
      if (value !== undefined) this.set(field.name, value);
    });
    // What cannot be used becomes what is used.
    const show = () => {
      input.value = this.state[field.name] ?? "";
      input.removeAttribute("aria-invalid");
    };
    input.addEventListener("blur", show);
    this.updates.push(show);
    return input;
  }

  field(field) {
    const input = this.number(field);
    const slider = h("input", { type: "range", min: field.min, max: field.max, step: field.step, "aria-label": `${field.label} slider` });
    const follow = () => {
      const value = this.state[field.name];
      slider.value = value ?? field.off;
      slider.setAttribute("aria-valuetext", value ?? "off");
    };
    slider.addEventListener("input", () => {
      const value = Number(slider.value);
      input.value = value === field.off ? "" : value;
      input.removeAttribute("aria-invalid");
      this.set(field.name, value === field.off ? null : value);
      follow();
    });
    input.addEventListener("input", follow);
    input.addEventListener("blur", follow);
    this.updates.push(follow);
    return h("div", { class: "field" }, h("label", { for: field.name }, field.label), input, slider,
      h("p", { class: "hint", id: `${field.name}-hint` }, field.hint));
  }

  seed() {
    return h("div", { class: "field" }, h("label", { for: "seed" }, SEED.label), this.number(SEED),
      h("p", { class: "hint", id: "seed-hint" }, SEED.hint));
  }

  samples() {
    const choices = Array.from({ length: MOST_SAMPLES }, (_, i) => {
      const radio = h("input", { type: "radio", name: "samples", value: i + 1, on: { change: () => this.set("samples", i + 1) } });
      this.updates.push(() => { radio.checked = this.state.samples === i + 1; });
      return h("label", {}, radio, h("span", {}, String(i + 1)));
    });
    return h("fieldset", { class: "field choices" }, h("legend", {}, "Samples"), h("div", {}, choices),
      h("p", { class: "hint" }, "How many texts to write side by side."));
  }
}
