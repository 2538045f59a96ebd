// How a model was made, and how its loss fell.

import { count, h, svg } from "./explain.js";

const PLACES = { left: 40, right: 12, top: 12, bottom: 44, height: 300, widest: 600 };
// Losses above this quantile are not drawn if they would flatten all others.
const USUAL = 0.97;

const duration = (s) => (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`);
const bytes = (n) => (n < 1e6 ? `${Math.round(n / 1e3)} kB` : n < 1e9 ? `${(n / 1e6).toFixed(1)} MB` : `${(n / 1e9).toFixed(1)} GB`);
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
const named = (source) => source?.reference ?? null;

/** What is known, as pairs of a name and a text. */
function facts(doc) {
  const { model: m, data } = doc;
  const loss = doc.best_val_loss;
  const known = [
    ["Architecture", m.block && `${m.block}, ${plural(m.n_layer, "block")} of ${plural(m.n_head, "head")}, width ${count(m.n_embd)}`],
    ["Context", m.block_size && plural(m.block_size, "token")],
    ["Tokenizer", m.vocab_size && [data?.tokenizer, plural(m.vocab_size, "token")].filter(Boolean).join(", ")],
    ["Trained on", data?.name && `${data.name}${data.tokens ? `, ${plural(data.tokens, "token")}` : ""}`],
    ["Training", doc.steps && `${plural(doc.steps, "step")}${doc.seconds ? ` in ${duration(doc.seconds)}` : ""}${doc.device ? ` on ${doc.device}` : ""}`],
    ["Weights", doc.best_step && doc.best_step !== doc.steps && `from step ${count(doc.best_step)}, which had the lowest loss`],
    ["Temperature", doc.temperature != null && `logits divided by ${doc.temperature.toPrecision(3)}`],
    [doc.held_out ? "Held-out loss" : "Validation loss", loss != null && `${loss.toFixed(4)} nats a token${doc.held_out ? ` on ${count(doc.held_out)} tokens of the training text` : ""}: as unsure as among ${Math.exp(loss).toPrecision(3)} tokens`],
    ["Bits per byte", doc.bits_per_byte?.toFixed(4)],
    ["Fine-tuned from", named(doc.parent)],
    ["Taught by", doc.teachers?.map(named).filter(Boolean).join(", ")],
    ["Imported from", doc.imported?.format],
    ["Published", doc.created && new Date(doc.created).toLocaleDateString("en-GB", { day: "numeric", month: "long", year: "numeric" })],
  ];
  return known.filter(([, text]) => text);
}

/** Round numbers that divide a range. */
function ticks(low, high, most) {
  const rough = (high - low) / most;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * size).find((n) => n >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

/** The curves as a picture. */
function picture({ train, val, best }) {
  const { left, right, top, bottom, height, widest } = PLACES;
  // Drawn at about its size on the page, so that its words are readable on a phone.
  const width = Math.min(widest, document.documentElement.clientWidth - 64);
  const losses = [...train, ...val].map(([, loss]) => loss).sort((a, b) => a - b);
  const low = losses[0];
  const high = Math.max(losses[Math.ceil(losses.length * USUAL) - 1], low + 1e-3);
  const last = Math.max(...train.map(([step]) => step), ...val.map(([step]) => step), 1);
  const x = (step) => left + ((width - left - right) * step) / last;
  const y = (loss) => top + ((height - top - bottom) * (high - loss)) / (high - low);
  const line = (points, kind) => svg("polyline", { class: kind, points: points.map(([step, loss]) => `${x(step).toFixed(1)},${y(loss).toFixed(1)}`).join(" ") });
  const words = [
    train.length ? `Training loss ${train.at(-1)[1].toFixed(2)} at the end.` : "",
    best ? `Lowest validation loss ${best[1].toFixed(4)} at step ${count(best[0])}.` : "",
  ];
  return svg("svg", { class: "curve", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Loss by step. ${words.join(" ")}` },
    ...ticks(low, high, 6).flatMap((loss, _, all) => [
      svg("line", { class: "grid", x1: left, x2: width - right, y1: y(loss), y2: y(loss) }),
      svg("text", { class: "tick end", x: left - 8, y: y(loss) + 4 }, loss.toFixed(all.every(Number.isInteger) ? 0 : Math.max(...all.map((n) => String(n).split(".")[1]?.length ?? 0)))),
    ]),
    ...ticks(0, last, width / 110).map((step) => svg("text", { class: "tick middle", x: Math.min(x(step), width - right - 14), y: height - 26 }, count(step))),
    svg("text", { class: "tick middle", x: (left + width - right) / 2, y: height - 6 }, "steps of training"),
    line(train, "train"), line(val, "val"),
    ...val.map(([step, loss]) => svg("circle", { class: "val", cx: x(step), cy: y(loss), r: val.length > 40 ? 0 : 3.5 })),
    ...(best ? [svg("circle", { class: "best", cx: x(best[0]), cy: y(best[1]), r: 7 })] : []));
}

function losses(curves) {
  return [
    h("ul", { class: "keys" }, h("li", { class: "train" }, "training"), h("li", { class: "val" }, "validation"), curves.best ? h("li", { class: "best" }, `lowest, ${curves.best[1].toFixed(4)}`) : null),
    picture(curves),
    curves.val.length ? h("details", {}, h("summary", {}, "As a table"),
      h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Validation losses" },
        h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "step"), h("th", { scope: "col" }, "validation loss"))),
          h("tbody", {}, curves.val.map(([step, loss]) => h("tr", {}, h("td", {}, count(step)), h("td", {}, loss.toFixed(4)))))))) : null,
  ];
}

/** The card of a model. */
export function card(doc) {
  const big = [[doc.parameters, count, "parameters"], [doc.bytes, bytes, "on disk"], [doc.best_val_loss, (loss) => loss.toFixed(3), doc.held_out ? "held-out loss" : "validation loss"]];
  return h("article", { class: "panel card" },
    h("header", {}, h("h2", {}, h("bdi", {}, doc.reference)),
      h("dl", { class: "big" }, big.filter(([value]) => value != null).map(([value, say, what]) => h("div", {}, h("dt", {}, what), h("dd", {}, say(value)))))),
    h("div", { class: "card-parts" },
      h("section", {}, h("h3", {}, "Loss"), doc.curves ? losses(doc.curves) : h("p", { class: "hint" }, "No losses were recorded for this model.")),
      h("section", {}, h("h3", {}, "Facts"),
        h("dl", { class: "facts" }, facts(doc).map(([name, text]) => h("div", {}, h("dt", {}, name), h("dd", {}, h("bdi", {}, text))))))),
    doc.card ? h("details", {}, h("summary", {}, "README.md"), h("pre", { class: "scroll", tabindex: 0, "aria-label": "README.md", role: "region" }, doc.card)) : null);
}
