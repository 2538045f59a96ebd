// Shows what `quill explain` computes: mount(element, document). The playground shares its small parts.
// Text of models and prompts enters the page as text nodes only, and nothing is requested.

const SVG = "http://www.w3.org/2000/svg";
const HOT = "224, 102, 20";
const COLD = "38, 122, 204";
const VISIBLE = { " ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍" };
const LABELS = {
  table: "Table of what follows", embedding: "Token embedding", positions: "Position embedding",
  norm: "Norm", attention: "Attention", mlp: "MLP", head: "Head", other: "",
};

/** Build an element: attributes, listeners under `on`, custom properties under `vars`, then children. */
export function h(tag, { on = {}, vars = {}, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  for (const [name, listener] of Object.entries(on)) made.addEventListener(name, listener);
  for (const [name, value] of Object.entries(vars)) made.style.setProperty(`--${name}`, value);
  made.append(...present(children));
  return made;
}

const present = (children) => children.flat(Infinity).filter((child) => child != null);

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const count = (n) => n.toLocaleString("en-US");
export const percent = (p) => (p >= 0.9995 || p === 0 ? `${Math.round(p * 100)}%` : p < 0.001 ? "<0.1%" : `${(p * 100).toFixed(1)}%`);
const fixed = (x, digits = 2) => x.toFixed(digits).replace("-", "−");
const signed = (x) => (x > 0 ? "+" : "") + fixed(x);
const times = (...sizes) => sizes.map(count).join(" × ");

/** A token with its spaces and control characters made visible. */
export function visible(text) {
  return text.replace(/[\s\p{C}]/gu, (c) => VISIBLE[c] ?? (c.trim() ? `\\u${c.codePointAt(0).toString(16)}` : "␣"));
}
const token = (text) => h("bdi", { class: "qx-token" }, visible(text));

/** A bar of a share of its column; the number beside it is the text that says it. */
const bar = (share, kind = "") => h("span", { class: `qx-bar ${kind}`, "aria-hidden": "true", vars: { share } });

/** Numbers of a vector as a strip of colours. */
function strip(values, most) {
  const canvas = h("canvas", { class: "qx-strip", width: values.length, height: 1, "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  values.forEach((value, i) => {
    pen.fillStyle = `rgba(${value > 0 ? HOT : COLD}, ${Math.min(1, Math.abs(value) / most) ** 0.7})`;
    pen.fillRect(i, 0, 1, 1);
  });
  return canvas;
}
const largest = (rows) => Math.max(1e-9, ...rows.flat().map(Math.abs));

/** The probabilities with which the next token is drawn: temperature, then top-k, then top-p. */
export function distribution(next, { temperature, topK, topP }) {
  const items = [
    ...next.logits.map(([id, text, logit]) => ({ id, text, logit, n: 1 })),
    ...next.rest.map(([logit, n]) => ({ logit, n })),
  ];
  const top = items[0].logit;
  if (temperature === 0 || topK === 1) return items.map((item, i) => ({ ...item, kept: i ? 0 : 1, p: i ? 0 : 1 }));
  let left = topK ?? Infinity;
  for (const item of items) {
    item.e = Math.exp((item.logit - top) / temperature);
    item.kept = Math.min(item.n, left);
    left -= item.kept;
  }
  const sum = () => items.reduce((all, item) => all + item.kept * item.e, 0);
  if (topP < 1) {
    const total = sum();
    let before = 0;
    for (const item of items) {
      // The sum before a token decides; of several equal ones, as many stay as are needed.
      const needed = Math.ceil((topP * (1 - 1e-12) * total - before) / Math.max(item.e, 1e-300));
      before += item.kept * item.e;
      item.kept = Math.max(0, Math.min(item.kept, needed));
    }
  }
  const total = sum();
  return items.map((item) => ({ ...item, p: (item.kept * item.e) / total }));
}

/**
 * Show an explanation.
 * @param {Element} root Emptied and filled.
 * @param {object} doc What `quill explain --json` prints.
 */
export function mount(root, doc) {
  root.replaceChildren();
  root.classList.add("qx");
  const page = new Page(doc);
  root.append(page.header(), page.picker(), ...page.sections(), page.footer());
  page.refresh();
}

class Page {
  constructor(doc) {
    this.doc = doc;
    this.last = doc.tokens.length - 1;
    this.state = { token: this.last, layer: 0, head: 0, unit: 0, target: 0, first: true };
    this.views = [];
    this.number = 0;
    if (doc.layers.length) Object.assign(this.state, this.sharpest());
  }

  /** The head that looks most decidedly at a token that is neither the first nor the reading one. */
  sharpest() {
    let found = { layer: 0, head: 0, weight: -1 };
    this.doc.layers.forEach((layer, i) => layer.weights.forEach((rows, j) => {
      const weight = Math.max(0, ...rows[this.last].slice(1, -1));
      if (weight > found.weight) found = { layer: i, head: j, weight };
    }));
    return { layer: found.layer, head: found.head, unit: found.layer };
  }

  set(change) {
    Object.assign(this.state, change);
    this.refresh();
  }

  refresh() {
    for (const view of this.views) view(this.state);
  }

  /** An element whose content follows the state. */
  live(tag, attributes, content) {
    const made = h(tag, attributes);
    this.views.push((state) => made.replaceChildren(...present([content(state)])));
    return made;
  }

  name(i) {
    return token(this.doc.tokens[i].text);
  }

  header() {
    const { doc } = this;
    const m = doc.model;
    const facts = [
      [count(m.parameters), "parameters"],
      ...(m.n_layer ? [[m.n_layer, "blocks"], [m.n_head, "heads each"], [m.n_embd, "numbers a token"]] : []),
      [m.block_size, "tokens of context"],
      [count(m.vocab_size), `${m.tokenizer} tokens`],
    ];
    return h("header", { class: "qx-header" },
      h("p", { class: "qx-over" }, "A look inside"),
      h("h1", {}, h("bdi", {}, doc.reference || "A model")),
      h("dl", { class: "qx-facts" }, facts.map(([value, what]) => h("div", {}, h("dt", {}, what), h("dd", {}, String(value))))),
      doc.left_out ? h("p", { class: "qx-note" }, `The prompt is longer: only its last ${doc.tokens.length} tokens are read here.`) : null,
    );
  }

  /** The prompt as buttons: what is chosen here, all sections are about. */
  picker() {
    const buttons = this.doc.tokens.map(({ text, id }, i) => h("button", {
      type: "button", class: "qx-chip", title: `token ${id}, position ${i}`,
      on: {
        click: () => this.set({ token: i }),
        keydown: (event) => {
          const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: this.last }[event.key];
          if (to == null || to < 0 || to > this.last) return;
          event.preventDefault();
          this.set({ token: to });
          buttons[to].focus();
        },
      },
    }, h("bdi", {}, visible(text))));
    const list = h("div", { class: "qx-chips", role: "group", "aria-label": "Tokens of the prompt" }, buttons);
    this.views.push((state) => buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === state.token));
      button.tabIndex = i === state.token ? 0 : -1;
      if (i === state.token) list.scrollLeft = button.offsetLeft - list.clientWidth / 2;
    }));
    return h("nav", { class: "qx-picker", "aria-label": "Chosen token" },
      h("span", { class: "qx-hint" }, "Prompt: choose a token"), list);
  }

  sections() {
    const { texts } = this.doc;
    const drawn = {
      model: () => this.model(), tokens: () => this.tokens(), embedding: () => this.embedding(),
      attention: () => this.attention(), softmax: () => this.softmax(), mlp: () => this.mlp(),
      residual: () => this.residual(), lens: () => this.lens(), sampling: () => this.next(),
      contributions: () => this.contributions(), training: () => this.training(),
    };
    return Object.entries(drawn).filter(([topic]) => texts[topic]).map(([topic, content]) => this.section(topic, content()));
  }

  section(topic, content) {
    const { title, body, sources } = this.doc.texts[topic];
    const id = `qx-${topic}`;
    return h("section", { class: "qx-section", "aria-labelledby": id },
      h("h2", { id }, h("span", { class: "qx-number", "aria-hidden": "true" }, String(++this.number)), title),
      h("p", { class: "qx-body" }, body),
      content,
      sources.length ? h("p", { class: "qx-sources" }, "Sources: ", sources.join("; "), ".") : null,
    );
  }

  // The model

  model() {
    const { parts, model: m } = this.doc;
    const T = this.doc.tokens.length;
    const total = m.parameters;
    const most = Math.max(...parts.map((part) => part.parameters));
    const box = (kind, title, detail, shape, parameters) => h("li", { class: `qx-box qx-${kind}` },
      h("span", { class: "qx-box-title" }, title),
      h("span", { class: "qx-box-detail" }, detail),
      h("span", { class: "qx-box-shape" }, shape),
      h("span", { class: "qx-box-count" }, parameters == null ? "" : count(parameters)),
      parameters ? bar(parameters / most, "qx-quiet") : h("span"),
    );
    const detail = (part) => {
      if (part.kind === "attention") {
        const shared = m.n_kv_head < m.n_head ? `, ${m.n_kv_head} for keys and values` : "";
        return `${m.n_head} heads of ${m.head_size}${shared}`;
      }
      if (part.kind === "mlp") return `${count(m.n_embd)} → ${count(m.mlp_size)} → ${count(m.n_embd)}, ${m.activation}`;
      if (part.kind === "norm") return m.norm;
      return Object.values(part.tensors).map((sizes) => times(...sizes)).join(", ");
    };
    const boxes = (kept) => parts.filter(kept).map((part) => box(
      part.kind, LABELS[part.kind] || part.name.split(".").pop(), detail(part),
      times(T, part.kind === "head" || part.kind === "table" ? m.vocab_size : m.n_embd), part.parameters));
    const before = boxes((p) => p.layer == null && ["table", "embedding", "positions"].includes(p.kind));
    const after = boxes((p) => p.layer == null && ["norm", "head"].includes(p.kind));
    if (m.n_layer && m.tie_embeddings) after.push(box("head", "Head", "the embedding table again", times(T, m.vocab_size), 0));
    const inside = parts.filter((p) => p.layer != null).reduce((all, p) => all + p.parameters, 0);
    const group = m.n_layer ? [h("li", { class: "qx-group" },
      h("p", { class: "qx-group-title" }, `${m.n_layer === 1 ? "1 block" : `${m.n_layer} blocks, each`}`,
        h("span", {}, `${count(inside)} parameters, ${percent(inside / total)}`)),
      h("ol", { class: "qx-flow" }, boxes((p) => p.layer === 0)))] : [];
    return h("ol", { class: "qx-flow", "aria-label": "The parts in the order in which tokens meet them" },
      box("end", `${T} ${T === 1 ? "token" : "tokens"}`, "from the prompt", String(T)), before, group, after,
      box("end", "Next token", "drawn from the last row", times(1, m.vocab_size)));
  }

  tokens() {
    return h("ol", { class: "qx-tokens" }, this.doc.tokens.map(({ id, text }) =>
      h("li", {}, token(text), h("span", { class: "qx-id" }, String(id)))));
  }

  // Embedding and positions

  embedding() {
    const { embedding: e, model: m } = this.doc;
    const most = largest([...e.token, ...e.sum]);
    return this.live("div", { class: "qx-vectors" }, ({ token: t }) => {
      const row = (label, values, extra) => [h("span", {}, label), strip(values, most), h("span", { class: "qx-num" }, extra)];
      const rows = [
        ...row(["row ", String(this.doc.tokens[t].id), " for ", this.name(t)], e.token[t], `length ${fixed(e.token_norm[t])}`),
        ...(e.position ? [
          ...row(`+ position ${t}`, e.position[t], `length ${fixed(e.position_norm[t])}`),
          ...row("= start of the stream", e.sum[t], ""),
        ] : []),
      ];
      const start = e.sum[t].slice(0, 6).map((x) => fixed(x, 3)).join(", ");
      const drawn = e.sum[t].length < m.n_embd ? ` The first ${e.sum[t].length} of ${m.n_embd} numbers are drawn.` : "";
      return [
        h("div", { class: "qx-strips" }, rows),
        h("p", { class: "qx-note" }, `${start}, … Orange is above zero, blue below.${drawn}`),
        m.positions === "rotary" ? this.dials(t) : null,
      ];
    });
  }

  /** How far pairs of numbers of a query or key are turned at a position. */
  dials(position) {
    const { head_size: D, rope_theta: theta } = this.doc.model;
    const pairs = D / 2;
    const shown = [...new Set(Array.from({ length: Math.min(8, pairs) }, (_, i) => Math.round((i * (pairs - 1)) / Math.max(1, Math.min(8, pairs) - 1))))];
    const dial = (j) => {
      const angle = position * theta ** ((-2 * j) / D);
      const [x, y] = [Math.cos(angle), -Math.sin(angle)];
      return h("li", {},
        svg("svg", { viewBox: "-1.2 -1.2 2.4 2.4", class: "qx-dial", "aria-hidden": "true" },
          svg("circle", { r: 1 }), svg("line", { x2: x, y2: y }), svg("circle", { cx: x, cy: y, r: 0.16, class: "qx-tip" })),
        h("span", {}, `pair ${j + 1}`), h("span", { class: "qx-num" }, `${fixed(angle, angle < 1 ? 3 : 1)} rad`));
    };
    return [
      h("p", {}, `At position ${position}, each pair of numbers of a query or key is turned by its own angle:`),
      h("ol", { class: "qx-dials" }, shown.map(dial)),
    ];
  }

  // Attention

  weights(layer, head) {
    const rows = this.doc.layers[layer].weights[head];
    if (this.state.first) return rows;
    return rows.map((row, t) => {
      const rest = row.slice(1).reduce((all, w) => all + w, 0);
      return t === 0 || rest <= 0 ? row.map(() => 0) : row.map((w, s) => (s ? w / rest : 0));
    });
  }

  attention() {
    const { layers, model: m } = this.doc;
    const thumbs = layers.map((_, i) => Array.from({ length: m.n_head }, (_, j) => this.thumb(i, j)));
    const grid = h("div", { class: "qx-scroll", tabindex: 0, role: "region", "aria-label": "All heads" },
      h("div", { class: "qx-heads", vars: { heads: m.n_head } }, thumbs.map((row, i) => [
        h("span", { class: "qx-axis" }, `block ${i + 1}`), row])));
    const toggle = h("label", { class: "qx-check" },
      h("input", { type: "checkbox", on: { change: (event) => this.set({ first: !event.target.checked }) } }),
      "Leave out the first token, where heads rest, and rescale the others");
    return h("div", { class: "qx-attention" },
      h("div", {}, h("h3", {}, "Every head"), grid, toggle),
      h("div", {}, this.live("h3", {}, (s) => `Block ${s.layer + 1}, head ${s.head + 1}`), this.map(), this.reading()));
  }

  thumb(layer, head) {
    const T = this.doc.tokens.length;
    const canvas = h("canvas", { width: T, height: T, "aria-hidden": "true" });
    const pen = canvas.getContext("2d");
    const button = h("button", {
      type: "button", class: "qx-thumb", "aria-label": `Block ${layer + 1}, head ${head + 1}`,
      on: { click: () => this.set({ layer, head }) },
    }, canvas);
    let drawn = null;
    this.views.push((state) => {
      button.setAttribute("aria-pressed", String(state.layer === layer && state.head === head));
      if (drawn === state.first) return;
      drawn = state.first;
      pen.clearRect(0, 0, T, T);
      this.weights(layer, head).forEach((row, t) => row.forEach((w, s) => {
        pen.fillStyle = `rgba(${HOT}, ${w})`;
        pen.fillRect(s, t, 1, 1);
      }));
    });
    return button;
  }

  map() {
    const names = this.doc.tokens.map(({ text }) => visible(text));
    const T = names.length;
    const room = Math.min(7, Math.max(1.4, 0.62 * Math.max(...names.map((n) => [...n].length))));
    const short = (name) => ([...name].length > 10 ? `${[...name].slice(0, 9).join("")}…` : name);
    return this.live("div", { class: "qx-map" }, ({ layer, head, token: t }) => {
      const picture = svg("svg", {
        viewBox: `${-room} ${-room} ${T + room} ${T + room}`, role: "img",
        "aria-label": `Attention of block ${layer + 1}, head ${head + 1}: rows read, columns are read`,
      });
      picture.append(svg("path", { class: "qx-triangle", d: `M0 0 ${Array.from({ length: T }, (_, i) => `H${i + 1} V${i + 1}`).join(" ")} H0 Z` }));
      this.weights(layer, head).forEach((row, r) => row.forEach((w, c) => {
        if (w >= 0.004) picture.append(svg("rect", { x: c, y: r, width: 1, height: 1, class: "qx-cell", "fill-opacity": w }));
      }));
      picture.append(svg("rect", { x: 0, y: t, width: t + 1, height: 1, class: "qx-row" }));
      names.forEach((name, i) => {
        const chosen = i === t ? "qx-label qx-chosen" : "qx-label";
        picture.append(
          svg("text", { x: -0.25, y: i + 0.5, class: `${chosen} qx-reads` }, short(name)),
          svg("text", { transform: `translate(${i + 0.5} -0.25) rotate(-90)`, class: chosen }, short(name)));
      });
      picture.addEventListener("click", (event) => {
        const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
        if (at.y >= 0 && at.y < T) this.set({ token: Math.floor(at.y) });
      });
      return picture;
    });
  }

  /** The row of the chosen token in words, and what kind of head this is in numbers. */
  reading() {
    return this.live("div", { class: "qx-reading", "aria-live": "polite" }, ({ layer, head, token: t }) => {
      const row = this.weights(layer, head)[t];
      const order = row.map((w, s) => [w, s]).filter(([w]) => w >= 0.01).sort((a, b) => b[0] - a[0]).slice(0, 5);
      const facts = this.doc.layers[layer].heads[head];
      const stats = [
        ["the token before", facts.previous], ["the first token", facts.first], ["itself", facts.self],
      ];
      return [
        h("p", {}, this.name(t), ` at position ${t} reads `,
          order.flatMap(([w, s], i) => [i ? ", " : "", this.name(s), s === t ? " (itself) " : ` (${t - s} back) `, percent(w)]), order.length ? "." : "nothing."),
        h("p", { class: "qx-note" }, "On average over the prompt this head reads ",
          stats.map(([what, share]) => `${what} ${percent(share)}`).join(", "),
          `; entropy ${fixed(facts.entropy)} nats, as if it spread over ${fixed(Math.exp(facts.entropy), 1)} tokens.`),
      ];
    });
  }

  softmax() {
    const { layers } = this.doc;
    return this.live("div", {}, ({ layer, head, token: t }) => {
      const scores = layers[layer].scores[head][t];
      const weights = layers[layer].weights[head][t];
      const { scale } = layers[layer];
      const top = Math.max(...scores);
      const sum = scores.reduce((all, s) => all + Math.exp(s - top), 0);
      const rows = this.doc.tokens.map((_, s) => s > t
        ? h("tr", { class: "qx-hidden" }, h("th", { scope: "row" }, this.name(s)), h("td", { colspan: 4 }, "later: hidden"))
        : h("tr", {}, h("th", { scope: "row" }, this.name(s)),
          h("td", {}, fixed(scores[s] / scale)), h("td", {}, fixed(scores[s])),
          h("td", {}, Math.exp(scores[s] - top).toFixed(4)),
          h("td", {}, h("span", { class: "qx-with-bar" }, bar(weights[s]), percent(weights[s])))));
      const strongest = rows[weights.indexOf(Math.max(...weights))];
      const box = h("div", { class: "qx-scroll qx-tall qx-medium", tabindex: 0, role: "region", "aria-label": "Scores and weights" },
        h("table", {}, h("thead", {}, h("tr", {},
          ["read token", "query · key", "× scale", "e^(score − max)", "weight"].map((title) => h("th", { scope: "col" }, title)))),
        h("tbody", {}, rows)));
      // Once it is part of the page, it shows the token that is read most.
      queueMicrotask(() => { box.scrollTop = strongest.offsetTop - box.clientHeight / 2; });
      return [
        h("p", {}, `Block ${layer + 1}, head ${head + 1}, the query of `, this.name(t), ` at position ${t}. The scale is ${scale.toPrecision(3)}; `,
          `the largest score, ${fixed(top)}, is subtracted first, which changes no weight; the sum is ${sum.toFixed(3)}.`),
        box,
      ];
    });
  }

  // MLP and stream

  mlp() {
    const { layers, model: m } = this.doc;
    const tabs = h("div", { class: "qx-tabs", role: "group", "aria-label": "Block" }, layers.map((_, i) => {
      const button = h("button", { type: "button", on: { click: () => this.set({ unit: i }) } }, `Block ${i + 1}`);
      this.views.push((state) => button.setAttribute("aria-pressed", String(state.unit === i)));
      return button;
    }));
    return h("div", {}, tabs, this.live("div", {}, ({ unit, token: t }) => {
      const layer = layers[unit];
      const most = Math.max(1e-9, ...layer.units[t].map(([, value]) => Math.abs(value)));
      const few = layer.units_for_90_percent[t];
      return [
        h("p", {}, "At ", this.name(t), `, ${count(few)} of ${count(m.mlp_size)} hidden units (${percent(few / m.mlp_size)}) make up 90% of the hidden vector's squared length. The strongest:`),
        h("table", { class: "qx-bars" }, h("caption", { class: "qx-sr" }, "Strongest hidden units"),
          h("tbody", {}, layer.units[t].map(([id, value]) => h("tr", {},
            h("th", { scope: "row" }, `unit ${id}`), h("td", { class: "qx-num" }, signed(value)),
            h("td", { class: "qx-wide" }, bar(Math.abs(value) / most, value < 0 ? "qx-cold" : "")))))),
      ];
    }));
  }

  residual() {
    const { embedding, layers } = this.doc;
    return this.live("div", { class: "qx-scroll", tabindex: 0, role: "region", "aria-label": "The stream" }, ({ token: t }) => {
      const start = embedding.sum_norm[t];
      const longest = Math.max(start, ...layers.flatMap((l) => [l.attention_norm[t], l.mlp_norm[t], l.stream_norm[t]]));
      const row = (label, norm, values, kind = "") => h("tr", { class: kind },
        h("th", { scope: "row" }, label), h("td", { class: "qx-num" }, fixed(norm)),
        h("td", { class: "qx-wide" }, bar(norm / longest, kind && "qx-cold")),
        h("td", { class: "qx-wide" }, strip(values, largest([values]))));
      return h("table", { class: "qx-bars" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "step"), h("th", { scope: "col" }, "length"),
          h("td", {}), h("th", { scope: "col" }, "the vector, each row in its own scale"))),
        h("tbody", {}, row("embedding", start, embedding.sum[t]),
          layers.flatMap((l, i) => [
            row(`+ attention ${i + 1}`, l.attention_norm[t], l.attention[t], "qx-added"),
            row(`+ MLP ${i + 1}`, l.mlp_norm[t], l.mlp[t], "qx-added"),
            row(`after block ${i + 1}`, l.stream_norm[t], l.stream[t]),
          ])));
    });
  }

  lens() {
    const { lens, tokens } = this.doc;
    const table = h("table", { class: "qx-lens" },
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "after"), tokens.map((_, t) => h("th", { scope: "col" }, this.name(t))))),
      h("tbody", {}, lens.map(({ after, top }) => h("tr", {}, h("th", { scope: "row" }, after),
        top.map(([[text, p]]) => h("td", { vars: { p }, title: percent(p) }, token(text)))))));
    this.views.push(({ token: t }) => {
      for (const row of table.rows) [...row.cells].forEach((cell, i) => cell.classList.toggle("qx-chosen", i === t + 1));
    });
    return h("div", {},
      h("p", {}, "A column is a token of the prompt, a cell what the head would take for the token that follows it; the darker, the surer."),
      h("div", { class: "qx-scroll", tabindex: 0, role: "region", "aria-label": "Every token" }, table),
      this.live("div", {}, ({ token: t }) => [
        h("p", {}, "After ", this.name(t), ` at position ${t}:`),
        h("div", { class: "qx-scroll", tabindex: 0, role: "region", "aria-label": "The chosen token" },
          h("table", { class: "qx-bars" },
            h("thead", {}, h("tr", {}, ["after", "likeliest", "second", "third", "rank of the last"].map((c) => h("th", { scope: "col" }, c)))),
            h("tbody", {}, lens.map(({ after, top, rank, final }) => h("tr", {}, h("th", { scope: "row" }, after),
              [0, 1, 2].map((i) => h("td", {}, top[t][i] ? [token(top[t][i][0]), " ", h("span", { class: "qx-num" }, percent(top[t][i][1]))] : "")),
              h("td", {}, `${count(rank[t])} (${percent(final[t])})`)))))),
      ]));
  }

  // The next token

  next() {
    const { next } = this.doc;
    const size = next.logits.length + next.rest.reduce((all, [, n]) => all + n, 0);
    const most = Math.min(size, 100);
    const chosen = { temperature: next.temperature, topK: next.top_k, topP: next.top_p ?? 1 };
    const result = h("div", { class: "qx-next qx-scroll", tabindex: 0, role: "region", "aria-label": "Probabilities" });
    const status = h("p", { class: "qx-drawn", role: "status" });
    const slider = (label, attributes, value, said, change) => {
      const shown = h("span", { class: "qx-num qx-said" }, said(value));
      const input = h("input", {
        type: "range", ...attributes, value, "aria-valuetext": said(value),
        on: { input: () => {
          const now = Number(input.value);
          shown.textContent = said(now);
          input.setAttribute("aria-valuetext", said(now));
          change(now);
          draw();
        } },
      });
      return h("label", { class: "qx-slider" }, h("span", {}, label), input, shown);
    };
    const draw = () => {
      const plain = distribution(next, { temperature: 1, topK: null, topP: 1 });
      const now = distribution(next, chosen);
      const left = now.reduce((all, { kept }) => all + kept, 0);
      const shown = now.slice(0, 12);
      const rest = (items) => items.slice(12).reduce((all, { p }) => all + p, 0);
      const row = (name, id, before, after, kind = "") => h("tr", { class: kind }, h("th", { scope: "row" }, name),
        h("td", { class: "qx-num" }, id), h("td", { class: "qx-num" }, percent(before)), h("td", { class: "qx-num" }, percent(after)),
        h("td", { class: "qx-wide" }, h("span", { class: "qx-two" }, bar(before, "qx-quiet"), bar(after))));
      result.replaceChildren(
        h("table", { class: "qx-bars" },
          h("thead", {}, h("tr", {}, ["token", "logit", "model", "drawn"].map((c) => h("th", { scope: "col" }, c)), h("td", {}))),
          h("tbody", {}, shown.map(({ text, logit }, i) => row(token(text), fixed(logit), plain[i].p, now[i].p, now[i].kept ? "" : "qx-out")),
            size > 12 ? row(`${count(size - 12)} others`, "", rest(plain), rest(now)) : null)),
        h("p", { class: "qx-note" }, `${left === 1 ? "1 token is" : `${count(left)} tokens are`} left to draw from. Grey is the model's own probability, orange that after temperature and filters.`));
    };
    const pick = () => {
      let at = Math.random();
      const found = distribution(next, chosen).find(({ p }) => (at -= p) < 0);
      status.replaceChildren("Drawn: ", found?.text == null ? "one of the others" : token(found.text));
    };
    draw();
    return h("div", {},
      h("p", {}, "After the last token of the prompt, ", this.name(this.last), ":"),
      h("div", { class: "qx-sliders" },
        slider("Temperature", { min: 0, max: 2, step: 0.05 }, chosen.temperature, (v) => (v ? v.toFixed(2) : "0, the likeliest"), (v) => { chosen.temperature = v; }),
        slider("Top-k", { min: 1, max: most, step: 1 }, chosen.topK ?? most, (v) => (v >= most ? "off" : String(v)), (v) => { chosen.topK = v >= most ? null : v; }),
        slider("Top-p", { min: 0.05, max: 1, step: 0.01 }, chosen.topP, (v) => (v >= 1 ? "off" : v.toFixed(2)), (v) => { chosen.topP = v; }),
        h("div", { class: "qx-draw" }, h("button", { type: "button", class: "qx-button", on: { click: pick } }, "Draw a token"), status)),
      result);
  }

  contributions() {
    const { contributions: c, layers } = this.doc;
    const tabs = h("div", { class: "qx-tabs", role: "group", "aria-label": "Token to explain" }, c.tokens.map(([, text], i) => {
      const button = h("button", { type: "button", on: { click: () => this.set({ target: i }) } }, token(text));
      this.views.push((state) => button.setAttribute("aria-pressed", String(state.target === i)));
      return button;
    }));
    const both = this.live("div", {}, ({ target: n }) => {
      const heads = layers.flatMap((_, i) => c.heads[i].map((values, j) => [`block ${i + 1}, head ${j + 1}`, values[n]]));
      const shares = [
        ["embedding", c.embedding[n]], ...(c.positions ? [["positions", c.positions[n]]] : []),
        ...layers.flatMap((_, i) => [[`attention ${i + 1}`, c.attention[i][n]], [`MLP ${i + 1}`, c.mlp[i][n]]]),
        ["last biases", c.constant[n]],
      ].filter(([label, value]) => value !== 0 || label === "embedding");
      heads.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
      const most = Math.max(1e-9, ...[...shares, ...heads].map(([, value]) => Math.abs(value)));
      const table = (caption, rows) => h("table", { class: "qx-bars qx-signed" }, h("caption", {}, caption),
        h("tbody", {}, rows.map(([label, value]) => h("tr", {}, h("th", { scope: "row" }, label), h("td", { class: "qx-num" }, signed(value)),
          h("td", { class: "qx-wide" }, h("span", { class: "qx-axis-bar", "aria-hidden": "true", vars: { share: Math.abs(value) / most, from: value < 0 ? 50 - (50 * -value) / most : 50 } }, h("span", { class: value < 0 ? "qx-cold" : "" })))))));
      return [
        h("p", {}, "The logit of ", token(c.tokens[n][1]), ` is ${fixed(c.total[n])} above the mean of all tokens. These add up to it:`),
        h("div", { class: "qx-columns" }, table("By part", shares), table("The ten strongest heads", heads.slice(0, 10))),
      ];
    });
    return h("div", {}, tabs, both);
  }

  training() {
    const { tokens } = this.doc;
    const known = tokens.filter(({ surprise }) => surprise != null);
    if (!known.length) return h("p", {}, "The prompt has only one token, so there is none to predict.");
    const most = Math.max(...known.map(({ surprise }) => surprise));
    const mean = known.reduce((all, { surprise }) => all + surprise, 0) / known.length;
    return h("div", {},
      h("p", {}, `The mean over this prompt is ${fixed(mean)} nats, as if the model chose among ${fixed(Math.exp(mean), 1)} equally likely tokens each time.`),
      h("ol", { class: "qx-surprise" }, tokens.map(({ text, surprise }) => h("li", {},
        h("span", { class: "qx-column", "aria-hidden": "true", vars: { share: (surprise ?? 0) / Math.max(most, 1e-9) } }),
        token(text), h("span", { class: "qx-id" }, surprise == null ? "given" : fixed(surprise))))));
  }

  footer() {
    return h("footer", { class: "qx-footer" }, "Every number comes from this model and this prompt. Made with quill.");
  }
}
