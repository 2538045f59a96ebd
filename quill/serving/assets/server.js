// Talks to the server that sent this page, and to no other.

const KEY = "quill-key";

const sentence = (text) => `${text.slice(0, 1).toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

/** What went wrong, in a sentence for people. */
export class ServerError extends Error {
  constructor(message) {
    super(sentence(message));
  }
}

const gone = () => new ServerError("The server does not answer. Check that quill serve is still running, and try again.");

/** Ask for the key; it is kept until the tab is closed. */
function askForKey(wasWrong) {
  document.getElementById("key-hint").textContent = wasWrong ? "That key is wrong." : "This server answers only those who have a key.";
  const dialog = document.getElementById("key");
  const field = document.getElementById("key-value");
  field.value = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    if (field.value) sessionStorage.setItem(KEY, field.value.trim());
    resolve(Boolean(field.value));
  }, { once: true }));
}

async function request(path, { body, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : gone();
  }
  if (answer.ok) return answer;
  if (answer.status === 401 && (await askForKey(Boolean(key)))) return request(path, { body, signal });
  const { error } = await answer.json().catch(() => ({}));
  throw new ServerError(error?.message ?? `The server answered with status ${answer.status}`);
}

/** The answer to a request as a document: GET, or POST where there is a body. */
export async function ask(path, options) {
  return (await request(path, options)).json();
}

/** The chunks of a completion as they come; `notice` is called with what the server has to say of the prompt. */
export async function* complete(body, signal, notice) {
  const answer = await request("v1/completions", { body: { ...body, stream: true }, signal });
  if (answer.headers.has("x-quill-notice")) notice(sentence(answer.headers.get("x-quill-notice")));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : gone(); });
    if (done) throw gone();
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield chunk;
    }
  }
}
