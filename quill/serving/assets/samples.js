// The texts that models write: token by token, side by side, and on from any of their tokens.

import { count, h, percent, visible } from "./explain.js";
import { complete } from "./server.js";

// From likely to unlikely: the least probability of each shade, and what the legend says.
const SHADES = [[0.6, "over 60%"], [0.3, "30–60%"], [0.1, "10–30%"], [0.03, "3–10%"], [0.01, "1–3%"], [0, "under 1%"]];
const LIKELIEST = 8;

// Characters without a shape of their own: those that control a device or the direction of a text.
const UNSEEN = /^[^\P{C}\n\t\p{Cn}]+$/u;

const shade = (p) => SHADES.findIndex(([least]) => p >= least);
const ordinal = (n) => `${n}${["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th"}`;

/** What the shades mean. */
export function legend() {
  return h("p", { class: "legend" }, h("span", {}, "How likely the model found each token:"),
    SHADES.map(([, words], i) => h("span", { class: `t s${i}` }, words)),
    h("span", { class: "light" }, "Choose a token to see what else it could have been, and to continue from there."));
}

/** A text that a model wrote, as it is so far. */
class Take {
  constructor(prompt, seed) {
    Object.assign(this, { prompt, seed, promptIds: [], chars: [], tokens: [], finish: null });
    this.base = 0;
  }

  /** The same up to a token, and then another one. */
  branch(at, other) {
    const made = new Take(this.prompt, this.seed);
    const { start, top } = this.tokens[at];
    made.promptIds = this.promptIds;
    made.chars = [...this.chars.slice(0, start), ...other.name];
    made.tokens = [...this.tokens.slice(0, at), { ...other, start, top, chosen: true }];
    return made;
  }

  get text() {
    return this.chars.join("");
  }

  /** The text before a token, with the prompt. */
  before(at) {
    return this.prompt + this.chars.slice(0, this.tokens[at].start).join("");
  }

  /** The text of one token; empty for the first tokens of a character. */
  word(at) {
    return this.chars.slice(this.tokens[at].start, this.tokens[at + 1]?.start).join("");
  }

  /** The tokens that the model reads to continue. */
  ids(most) {
    return [...this.promptIds, ...this.tokens.map(({ id }) => id)].slice(-most);
  }

  /** Take in a choice of a chunk. */
  add({ text, token_ids: ids, prompt_token_ids: promptIds, logprobs, finish_reason: finish }) {
    if (promptIds && !this.tokens.length) this.promptIds = promptIds;
    this.chars.push(...text);
    logprobs.tokens.forEach((name, i) => {
      const top = Object.entries(logprobs.top_logprobs[i]).map(([other, value]) => ({
        name: other, id: logprobs.top_token_ids[i][other], p: Math.exp(value),
      })).sort((a, b) => b.p - a.p);
      this.tokens.push({ name, id: ids[i], p: Math.exp(logprobs.token_logprobs[i]), start: this.base + logprobs.text_offset[i], top });
    });
    this.finish = finish ?? this.finish;
  }
}

/** Whether a token's text is whole, so that a text can go on after it. */
const isWhole = ({ name }) => !name.startsWith("bytes:");

/** One sample on the page, with all takes of it. */
export class Sample {
  /**
   * @param {object} model As the server describes it.
   * @param {string} title What tells it from the others.
   * @param {object} hooks `choose(sample, token)`, `more(sample)`, `say(text)`.
   */
  constructor(model, title, hooks) {
    Object.assign(this, { model, title, hooks, takes: [], at: 0, cursor: -1, drawn: 0, running: false });
    this.body = h("div", {
      class: "text", tabindex: 0, role: "group", "aria-label": `${title}: the arrow keys walk through its tokens`,
      on: { click: (event) => this.clicked(event), keydown: (event) => this.key(event), mouseover: (event) => this.hover(event) },
    });
    this.pager = h("span", { class: "pager" });
    this.note = h("span", { class: "note" });
    this.wrong = h("div");
    this.copy = h("button", { type: "button", class: "button small", on: { click: () => this.copied() } }, "Copy");
    this.more = h("button", { type: "button", class: "button small", on: { click: () => hooks.more(this) } }, "Continue");
    this.tokens = h("button", { type: "button", class: "button small", on: { click: () => this.open(Math.max(this.cursor, 0)) } }, "Tokens");
    this.element = h("article", { class: "panel sample", "aria-label": title },
      h("div", { class: "sample-head" }, h("h3", {}, h("bdi", {}, title)), this.pager), this.body, this.wrong,
      h("div", { class: "sample-foot" }, this.note, this.tokens, this.copy, this.more));
  }

  get take() {
    return this.takes[this.at];
  }

  /** Begin with a prompt. */
  start(prompt, seed) {
    this.begin(new Take(prompt, seed));
  }

  /** Begin with a take, or with another one; the earlier ones can be turned back to. */
  begin(take) {
    this.takes.push(take);
    this.turn(this.takes.length - 1);
  }

  turn(at) {
    this.at = at;
    this.redraw();
    const go = (to, label, sign) => h("button", {
      type: "button", class: "button small", "aria-label": label, disabled: to < 0 || to >= this.takes.length,
      on: { click: () => { this.turn(to); this.pager.querySelector("button:not([disabled])")?.focus(); } },
    }, sign);
    this.pager.replaceChildren(...(this.takes.length < 2 ? [] : [
      go(at - 1, "Earlier text", "‹"), h("span", {}, `${at + 1} of ${this.takes.length}`), go(at + 1, "Later text", "›"),
    ]));
  }

  redraw() {
    this.cursor = -1;
    this.drawn = 0;
    this.body.replaceChildren(h("span", { class: "given" }, this.take.prompt));
    this.draw();
  }

  /** Show what is new. */
  draw() {
    const { take, body } = this;
    // The text of the last token may have grown since.
    for (let i = Math.max(0, this.drawn - 1); i < take.tokens.length; i++) {
      const { p, name, chosen } = take.tokens[i];
      const word = take.word(i);
      const span = body.children[i + 1] ?? body.appendChild(h("span"));
      span.className = `t s${shade(p)}${word.includes("\n") ? " line" : ""}${chosen ? " chosen" : ""}`;
      span.textContent = word;
      span.dataset.part = word ? (UNSEEN.test(word) ? visible(word) : "") : name.replace(/^bytes:|\\x/g, "");
    }
    this.drawn = take.tokens.length;
    const words = this.running ? [] : [
      take.tokens.length ? `${count(take.tokens.length)} tokens` : "",
      take.finish === "stop" ? "the model ended the text" : take.finish ? "" : take.tokens.length ? "stopped" : "",
      take.tokens.length ? `seed ${take.seed}` : "",
    ];
    this.note.textContent = words.filter(Boolean).join(" · ");
    this.element.setAttribute("aria-busy", String(this.running));
    this.element.classList.toggle("waiting", this.running && !take.tokens.length);
    for (const button of [this.copy, this.more, this.tokens]) button.hidden = this.running || !take.tokens.length;
  }

  /** Say something about the text, next to it. */
  remark(words) {
    this.wrong.replaceChildren(h("p", { class: "hint" }, words));
  }

  fail(message) {
    this.wrong.replaceChildren(h("p", { class: "message", role: "alert" }, message));
  }

  // Choosing a token

  clicked(event) {
    const at = this.indexOf(event.target);
    if (at >= 0 && !String(getSelection())) this.open(at);
  }

  indexOf(element) {
    const span = element.closest?.(".t");
    return span ? [...this.body.children].indexOf(span) - 1 : -1;
  }

  hover(event) {
    const at = this.indexOf(event.target);
    if (at >= 0) event.target.title = `${visible(this.take.tokens[at].name)}  ${percent(this.take.tokens[at].p)}`;
  }

  key(event) {
    const last = this.take.tokens.length - 1;
    const to = { ArrowLeft: this.cursor - 1, ArrowRight: this.cursor + 1, Home: 0, End: last }[event.key];
    if ((event.key === "Enter" || event.key === " ") && this.cursor >= 0) {
      event.preventDefault();
      this.open(this.cursor);
    } else if (to !== undefined && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      this.mark(Math.min(Math.max(to, 0), last));
      this.hooks.say(this.cursor < 0 ? "" : `${visible(this.take.word(this.cursor))} ${percent(this.take.tokens[this.cursor].p)}`);
    }
  }

  /** Put the cursor on a token; -1 takes it away. */
  mark(at) {
    this.span(this.cursor)?.classList.remove("cursor");
    this.cursor = at;
    const span = this.span(at);
    span?.classList.add("cursor");
    span?.scrollIntoView({ block: "nearest" });
    return span;
  }

  span(at) {
    return at < 0 ? null : this.body.children[at + 1];
  }

  open(at) {
    if (this.running || at < 0 || at >= this.take.tokens.length) return;
    this.hooks.choose(this, at);
  }

  async copied() {
    this.hooks.say(await copyText(this.take.prompt + this.take.text) ? "Copied" : "The browser does not allow copying");
    flash(this.copy, "Copied");
  }
}

/** Show another label on a button for a moment. */
export function flash(button, words) {
  const before = button.textContent;
  button.textContent = words;
  setTimeout(() => { button.textContent = before; }, 1500);
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

/** Generate into samples of one model until it is done or stopped. */
export async function write(samples, body, signal, progress) {
  const takes = samples.map((sample) => sample.take);
  takes.forEach((take) => { take.base = take.chars.length; take.finish = null; });
  for (const sample of samples) {
    sample.running = true;
    sample.wrong.replaceChildren();
    sample.draw();
  }
  try {
    const asked = { ...body, n: samples.length, logprobs: LIKELIEST, return_token_ids: true };
    const chunks = complete(asked, signal, (notice) => samples.forEach((sample) => sample.remark(notice)));
    for await (const { choices: [choice] } of chunks) {
      takes[choice.index].add(choice);
      progress(samples[choice.index], choice.token_ids.length);
    }
  } catch (error) {
    if (error.name !== "AbortError") samples.forEach((sample) => sample.fail(error.message));
  } finally {
    for (const sample of samples) {
      sample.running = false;
      sample.draw();
    }
  }
}

/** What else a token could have been, next to it. */
export class Alternatives {
  /** @param {object} hooks `branch(sample, at, other)` and `inside(sample, text)`. */
  constructor(element, hooks) {
    Object.assign(this, { element, hooks, sample: null, at: -1 });
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("beforetoggle", (event) => {
      if (event.newState === "closed") this.closed();
    });
  }

  show(sample, at) {
    if (this.sample && this.sample !== sample) this.sample.mark(-1);
    Object.assign(this, { sample, at });
    this.element.replaceChildren(...this.content());
    if (!this.element.matches(":popover-open")) this.element.showPopover();
    const span = sample.mark(at);
    const box = span.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const room = document.documentElement.clientWidth;
    const above = box.bottom + height + 16 > innerHeight && box.top > height + 16;
    this.element.style.setProperty("--x", `${Math.max(8, Math.min(box.left, room - width - 8)) + scrollX}px`);
    this.element.style.setProperty("--y", `${(above ? box.top - height - 8 : box.bottom + 8) + scrollY}px`);
    this.element.querySelector("h2").focus({ preventScroll: true });
  }

  close() {
    if (this.element.matches(":popover-open")) this.element.hidePopover();
  }

  closed() {
    const inside = this.element.contains(document.activeElement);
    if (inside) this.sample.body.focus({ preventScroll: true });
    else this.sample.mark(-1);
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    this.step(step);
  }

  step(by) {
    const to = this.at + by;
    if (to >= 0 && to < this.sample.take.tokens.length) this.show(this.sample, to);
  }

  content() {
    const { sample, at } = this;
    const { tokens } = sample.take;
    const { id, name, p, top, chosen } = tokens[at];
    const rank = top.findIndex((other) => other.id === id) + 1;
    const standing = rank > LIKELIEST ? `Not among the ${LIKELIEST} likeliest tokens here.` : `The ${rank === 1 ? "" : `${ordinal(rank)} `}likeliest token here.`;
    const rest = Math.max(0, 1 - top.reduce((all, other) => all + other.p, 0));
    // In the middle of a character no other one can begin.
    const midway = at > 0 && sample.take.word(at - 1) === "";
    const step = (by, sign, words) => h("button", {
      type: "button", class: "button small", "aria-label": words, disabled: at + by < 0 || at + by >= tokens.length, on: { click: () => this.step(by) },
    }, sign);
    const row = (other) => {
      const parts = [h("bdi", { class: "token" }, visible(other.name)),
        h("span", { class: "track", "aria-hidden": "true" }, h("span", { vars: { share: other.p } })),
        h("span", { class: "number" }, percent(other.p))];
      if (other.id === id) return h("li", {}, h("div", { class: "option taken", "aria-current": "true" }, parts, h("span", { class: "sr" }, chosen ? "chosen" : "drawn")));
      if (midway || !isWhole(other)) return h("li", {}, h("div", { class: "option", title: "Part of a character" }, parts));
      return h("li", {}, h("button", { type: "button", class: "option", on: { click: () => this.hooks.branch(sample, at, other) } }, parts));
    };
    return [
      h("div", { class: "alternatives-head" },
        h("h2", { id: "alternatives-title", tabindex: -1 }, h("bdi", { class: "token" }, visible(name)), ` ${percent(p)}`),
        step(-1, "‹", "Previous token"), step(1, "›", "Next token")),
      h("p", { class: "hint" }, chosen ? "You chose this token." : standing, " Choose another to continue from it."),
      h("ol", {}, top.map(row)),
      h("div", { class: "alternatives-foot" },
        h("button", { type: "button", class: "button small", on: { click: () => this.hooks.inside(sample, sample.take.before(at)) } }, "Look inside here"),
        rest > 0.0005 ? h("span", { class: "hint" }, `all others ${percent(rest)}`) : null),
    ];
  }
}
