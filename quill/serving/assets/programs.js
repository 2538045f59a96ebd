// The settings of the page as commands for other programs.

import { h } from "./explain.js";
import { copyText, flash } from "./samples.js";
import { sampling } from "./settings.js";

const shell = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
const given = (fields) => Object.entries(fields).filter(([, value]) => value != null);

/** A command of `quill sample` that writes the same. */
export function command(state) {
  const { length, temperature, top_k, top_p, min_p, seed, samples, prompt, model } = state;
  const flags = given({
    "--max-new-tokens": length, "--temperature": temperature, "--top-k": top_k, "--top-p": top_p, "--min-p": min_p,
    "--seed": seed, "--num-samples": samples > 1 ? samples : null,
  }).map(([flag, value]) => `${flag} ${value}`);
  return ["quill sample", shell(model), ...(prompt ? [`--prompt=${shell(prompt)}`] : []), ...flags].join(" ");
}

function fields(state) {
  return given({ model: state.model, prompt: state.prompt, ...sampling(state), seed: state.seed, n: state.samples > 1 ? state.samples : null });
}

function curl(state, address) {
  return `curl ${shell(new URL("v1/completions", address).href)} -H 'Content-Type: application/json' \\\n  -d ${shell(JSON.stringify(Object.fromEntries(fields(state))))}`;
}

function python(state, address) {
  const known = new Set(["top_k", "min_p"]);
  const extra = fields(state).filter(([name]) => known.has(name));
  const lines = fields(state).filter(([name]) => !known.has(name)).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  if (extra.length) lines.push(`    extra_body=${JSON.stringify(Object.fromEntries(extra))},`);
  return [
    "from openai import OpenAI", "", `client = OpenAI(base_url=${JSON.stringify(new URL("v1", address).href)}, api_key="none")`,
    "answer = client.completions.create(", ...lines, ")", "print(answer.choices[0].text)",
  ].join("\n");
}

/** A section that shows them; the result's `update()` follows the settings. */
export function programs(state) {
  const ways = [["Command line", command], ["curl", curl], ["Python", python]];
  const blocks = ways.map(([title, make]) => {
    const code = h("pre", { class: "scroll", tabindex: 0, role: "region", "aria-label": title });
    const button = h("button", { type: "button", class: "button small", "aria-label": `Copy: ${title}`, on: {
      click: async () => flash(button, (await copyText(code.textContent)) ? "Copied" : "Not allowed"),
    } }, "Copy");
    return { code, make, element: h("div", {}, h("h3", {}, title, button), code) };
  });
  const element = h("details", { class: "panel programs", on: { toggle: () => update() } },
    h("summary", {}, "Use these settings in a program"), blocks.map((block) => block.element));
  const update = () => {
    if (element.open) for (const { code, make } of blocks) code.textContent = make(state, document.baseURI.split("#")[0]);
  };
  return { element, update };
}
