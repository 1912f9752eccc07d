// The page of a server. All that comes from documents and models is put in as text, never as HTML.

const POLL_MS = 1000;
const IDLE_POLL_MS = 5000;
const AROUND = 400;

const $ = (id) => document.getElementById(id);

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

const number = (value) => value.toLocaleString("en");
const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// --- The server ---

let key = sessionStorage.getItem("key") ?? "";
let unlocking = null;

function askKey() {
  unlocking ??= new Promise((resolve) => {
    $("lockedWhy").textContent = key ? "That was not the key." :
      "This server asks for its key. The browser keeps it until this tab is closed.";
    $("locked").showModal();
    $("unlock").onsubmit = (event) => {
      event.preventDefault();
      key = $("key").value.trim();
      sessionStorage.setItem("key", key);
      $("key").value = "";
      $("locked").close();
      unlocking = null;
      resolve();
    };
  });
  return unlocking;
}

async function call(path, options = {}) {
  const used = key;
  const headers = {...options.headers};
  if (used) headers.Authorization = `Bearer ${used}`;
  const response = await fetch(path, {...options, headers});
  if (response.status === 401) {
    // Another call may have asked for it meanwhile.
    if (key === used) await askKey();
    return call(path, options);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Error(said?.error?.message ?? `The server said ${response.status}.`);
}

const json = async (path, options) => (await call(path, options)).json();

function below(what, query = {}) {
  const pairs = Object.entries(query).map(([name, value]) => `${name}=${encodeURIComponent(value)}`);
  return `v1/memories/${encodeURIComponent($("memory").value)}/${what}${pairs.length ? "?" : ""}${pairs.join("&")}`;
}

// --- Memories ---

const memories = new Map();

async function loadMemories() {
  for (const model of (await json("v1/models")).data) {
    memories.set(model.id, model);
    const option = element("option", "", model.memory ? model.id : `${model.id} (no memory)`);
    option.value = model.id;
    $("memory").append(option);
  }
}

const hasMemory = () => Boolean(memories.get($("memory").value)?.memory);

// --- Questions and answers ---

let messages = [];
let asking = null;

function anew() {
  asking?.abort();
  messages = [];
  $("turns").replaceChildren(element("p", "hint", hasMemory() ?
    "Ask about the documents of this memory. Each answer shows the passages that the model looked at." :
    "The model alone, without documents."));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// Keeps the end in sight, unless the reader has scrolled back.
function follow(change) {
  const turns = $("turns");
  const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
  change();
  if (atEnd) turns.scrollTop = turns.scrollHeight;
}

async function ask(question) {
  const turn = element("article", "turn");
  const answer = element("p", "answer");
  turn.append(element("p", "question", question), answer);
  if (!messages.length) $("turns").replaceChildren();
  $("turns").append(turn);
  $("turns").scrollTop = $("turns").scrollHeight;
  const own = asking = new AbortController();
  busy(true);
  const asked = [...messages, {role: "user", content: question}];
  let passages = [];
  let ended = false;
  let failed = false;
  try {
    const response = await call("v1/chat/completions", {
      method: "POST",
      headers: {"Content-Type": "application/json"},
      body: JSON.stringify({model: $("memory").value, messages: asked, stream: true}),
      signal: own.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      follow(() => answer.textContent += event.choices[0]?.delta.content ?? "");
      passages = event.passages ?? passages;
      ended ||= Boolean(event.choices[0]?.finish_reason);
    }
    if (!ended) throw new Error("The answer broke off.");
  } catch (error) {
    failed = error.name !== "AbortError";
    follow(() => turn.append(element("p", failed ? "failed" : "hint", failed ? error.message : "Stopped.")));
  } finally {
    if (own === asking) {
      asking = null;
      busy(false);
    }
  }
  if (!turn.isConnected) return;
  // What failed, or said nothing, is no part of the conversation.
  if (!failed && answer.textContent.trim()) messages = [...asked, {role: "assistant", content: answer.textContent}];
  else if (!failed && ended) answer.replaceChildren(element("span", "hint", "(no answer)"));
  showPassages(turn, passages);
}

function showPassages(turn, passages) {
  if (!passages.length) return;
  const list = element("ul", "passages");
  for (const passage of passages) {
    const about = element("small");
    about.append(
      element("span", "", passage.document),
      element("span", "", `${(100 * passage.share).toFixed(1)}% of the attention`),
    );
    const button = element("button");
    button.type = "button";
    button.append(about, element("q", "", passage.text.trim()));
    button.onclick = () => read(passage.document, passage.start, passage.stop);
    const item = element("li");
    item.append(button);
    list.append(item);
  }
  follow(() => turn.append(list));
}

function busy(is) {
  $("send").hidden = is;
  $("halt").hidden = !is;
}

// --- A document, read at a place ---

async function read(name, start, stop) {
  try {
    const found = await json(below("text", {name, start, stop, around: AROUND}));
    const mark = element("mark", "", found.text);
    $("placeName").textContent = name;
    $("placeAt").textContent = `Tokens ${number(found.first)} to ${number(found.last)} of ${number(found.tokens)}`;
    $("placeText").replaceChildren(found.before, mark, found.after);
    $("earlier").disabled = found.first === 0;
    $("later").disabled = found.last >= found.tokens;
    // Half of what is shown stays in sight.
    $("earlier").onclick = () => read(name, found.first, found.first);
    $("later").onclick = () => read(name, found.last, found.last);
    if (!$("place").open) $("place").showModal();
    $("placeText").scrollTop = found.start === found.stop ? 0 : mark.offsetTop - $("placeText").offsetTop - 60;
  } catch (error) {
    $("place").close();
    notice(error.message);
  }
}

// --- Documents ---

const rows = new Map();
const sending = new Map();

function row(id, name) {
  if (rows.has(id)) return rows.get(id);
  const item = element("li");
  const title = element("button", "name", name);
  title.type = "button";
  title.onclick = () => read(name, 0, 0);
  const forget = element("button", "forget", "Forget");
  forget.type = "button";
  forget.setAttribute("aria-label", `Forget ${name}`);
  forget.onclick = () => forgetDocument(name);
  const made = {item, title, forget, about: element("small"), bar: element("progress")};
  made.bar.setAttribute("aria-label", `Read of ${name}`);
  item.append(title, forget, made.about, made.bar);
  rows.set(id, made);
  return made;
}

const said = {
  ready: (one) => count(one.tokens, "token") + (one.stored ? "" : ", none of them stored any more"),
  incomplete: (one) => `${count(one.tokens, "token")}, not read to its end`,
  waiting: (one) => `waiting${one.detail ? `: ${one.detail}` : ""}`,
  reading: (one) => `reading: ${number(one.read)} of ${count(one.tokens, "token")}`,
  failed: (one) => `failed: ${one.detail}`,
  known: (one) => `has the text of ${one.same_as}`,
  sending: () => "sending",
};

function showDocuments(found) {
  const listed = [...found, ...sending.values()].map((one) => {
    const here = one.status === "ready" || one.status === "incomplete";
    const made = row(`${here ? "read" : one.status === "sending" ? "sent" : "job"} ${one.name}`, one.name);
    made.title.disabled = !here;
    made.forget.hidden = one.status === "sending";
    made.about.textContent = said[one.status](one);
    made.bar.hidden = !["waiting", "reading", "sending"].includes(one.status);
    if (one.status === "reading") {
      made.bar.max = one.tokens;
      made.bar.value = one.read;
    } else made.bar.removeAttribute("value");
    return made;
  });
  const items = listed.map((made) => made.item);
  for (const [id, made] of rows) if (!items.includes(made.item)) rows.delete(id);
  // What has the focus keeps it: nothing is moved that stands where it should.
  const list = $("documents");
  [...list.children].filter((item) => !items.includes(item)).forEach((item) => item.remove());
  items.forEach((item, place) => {
    if (list.children[place] !== item) list.insertBefore(item, list.children[place] ?? null);
  });
  const read = found.filter((one) => "stored" in one);
  const stored = read.reduce((sum, one) => sum + one.stored, 0);
  $("heldName").textContent = count(read.length, "document");
  $("sum").textContent = `${count(stored, "token")} stored`;
}

async function refresh() {
  $("held").hidden = !hasMemory();
  if (!hasMemory()) return;
  const memory = $("memory").value;
  const found = await json(below("documents"));
  if (memory !== $("memory").value) return;
  if (found.problem) notice(found.problem);
  showDocuments(found.data);
}

async function poll() {
  try {
    await refresh();
    if (poll.lost) notice("");
    poll.lost = false;
  } catch (error) {
    poll.lost = true;
    notice(error.name === "TypeError" ? "The server cannot be reached." : error.message);
  }
  // The list of a large memory is long.
  setTimeout(poll, poll.lost || document.querySelector("#documents progress:not([hidden])") ? POLL_MS : IDLE_POLL_MS);
}

async function forgetDocument(name) {
  if (!confirm(`Forget ${name}?`)) return;
  try {
    await call(below("documents", {name}), {method: "DELETE"});
    await refresh();
  } catch (error) {
    notice(error.message);
  }
}

async function send(files) {
  if (!hasMemory()) return;
  notice("");
  const batch = [...files].map((file) => [file, below("documents", {name: file.name})]);
  for (const [file] of batch) sending.set(file, {name: file.name, status: "sending"});
  for (const [file, path] of batch) {
    try {
      // Read here: the body then has no type and no name of the file.
      await call(path, {method: "PUT", body: await file.arrayBuffer()});
    } catch (error) {
      notice(`${file.name}: ${error.message}`);
    } finally {
      sending.delete(file);
    }
    await refresh().catch(() => {});
  }
}

// --- What users do ---

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (asking || !question) return;
  $("question").value = "";
  ask(question);
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("halt").onclick = () => asking?.abort();
$("anew").onclick = () => {
  anew();
  $("question").focus();
};
$("memory").onchange = () => {
  anew();
  notice("");
  rows.clear();
  $("documents").replaceChildren();
  refresh().catch((error) => notice(error.message));
};
$("placeEnd").onclick = () => $("place").close();
// Without the key there is nothing to go back to.
$("locked").oncancel = (event) => event.preventDefault();
$("files").onchange = () => {
  const files = [...$("files").files];
  $("files").value = "";
  send(files);
};
document.ondragover = (event) => {
  event.preventDefault();
  document.body.classList.add("over");
};
document.ondragleave = (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
};
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  send(event.dataTransfer.files);
};

// On a narrow screen the list is opened when it is wanted.
$("heldMore").open = matchMedia("(min-width: 50.01rem)").matches;

try {
  await loadMemories();
  anew();
  poll();
  $("question").focus();
} catch (error) {
  notice(error.message);
}
