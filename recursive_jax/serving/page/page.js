// A prompt, its answer by depth, and the engine. Texts of a model or a user enter the page through
// `textContent` only.

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");
// matplotlib's YlOrRd from 0.05 to 0.55, as `generate --heatmap` draws tokens: black is readable.
const SHADES = ["#fff8bb", "#ffe590", "#feca66", "#fea446", "#fd7435"];
const SHOWN_SLOTS = 32;
const SPOKEN_EVERY = 2000; // ms between two announcements of new text

let facts = null; // of the server; the first message of the feed
let running = null; // AbortController of the answer that grows
let watching = null; // AbortController of the feed
let thresholdMoved = false;
let talk = []; // messages of the chat so far
let focused = null; // the answer whose token is chosen
let answers = []; // shown ones: {tokens, box, chosen, prompt, …}

// The server.

class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const UNREACHABLE = "The server cannot be reached. Is it still running?";

async function call(path, body, signal) {
  const headers = {};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Problem(0, UNREACHABLE);
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  const message = found?.error?.message ?? `the server answered ${response.status}`;
  throw new Problem(response.status, message);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

function report(error) {
  const words = {
    401: "This server needs an API key. Enter it below the prompt.",
    429: `The server is busy: ${error.message}.`,
    503: "The server is still loading the model.",
  };
  $("problem").textContent = words[error.status] ?? sentence(error.message);
  if (error.status === 401 && $("key-field").hidden) {
    $("key-field").hidden = false;
    $("key").focus();
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1) + (text.endsWith(".") ? "" : ".");
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

// The engine's feed.

async function watch() {
  watching?.abort();
  const mine = (watching = new AbortController());
  const every = still.matches ? 1 : 0.25;
  while (!mine.signal.aborted) {
    try {
      await call("health", undefined, mine.signal);
      const response = await call(`engine?every=${every}`, undefined, mine.signal);
      const messages = events(response);
      learn(JSON.parse((await messages.next()).value));
      for await (const message of messages) draw(JSON.parse(message));
    } catch (error) {
      if (mine.signal.aborted) return;
      report(error instanceof Problem ? error : new Problem(0, UNREACHABLE));
      if (error.status === 401) return; // until a key is entered
    }
    await sleep(1000);
  }
}

function learn(news) {
  $("problem").textContent = "";
  const first = facts?.model !== news.model || facts.loops !== news.loops;
  facts = news;
  $("send").disabled = running !== null;
  if (!first) return;
  const { model, slots, lanes, loops, context } = facts;
  document.title = `${model}: depth at work`;
  $("facts").textContent =
    `${model}: ${count(loops, "loop")}, ${count(slots, "slot")}, ` +
    `${count(lanes, "lane")}, ${context} tokens of context.`;
  document.querySelector("input[value=chat]").disabled = !facts.chat;
  $("loops").max = $("loops").value = loops;
  $("lossless").checked = $("lossless").disabled = facts.lossless || !facts.can_exit;
  $("lossless-hint").textContent = facts.lossless
    ? "This server always is: early exits draft, the last loop decides."
    : facts.can_exit ? "" : "Always: this server was started without early exits.";
  const measure = facts.measure;
  if (measure) {
    Object.assign($("threshold"), { min: measure.low, max: measure.high, step: 0.001 });
    $("threshold").value = measure.own[0];
  }
  settle();
  legend();
  layGrid();
}

function layGrid() {
  const { loops, slots } = facts;
  const shown = Math.min(slots, SHOWN_SLOTS);
  const grid = $("grid");
  grid.style.gridTemplateColumns = `2rem repeat(${loops}, minmax(0, 1fr))`;
  const heads = Array.from({ length: loops }, (_, n) => make("span", `${n + 1}`));
  grid.replaceChildren(make("span", ""), ...heads);
  for (let slot = 0; slot < shown; slot++) {
    grid.append(make("span", `${slot + 1}`));
    for (let loop = 1; loop <= loops; loop++) {
      const bar = make("b", "");
      bar.style.backgroundColor = shade(loop);
      const cell = make("i", "");
      cell.append(bar);
      grid.append(cell);
    }
  }
}

let recent = []; // news of the last second

function draw(news) {
  recent = [...recent, news].slice(still.matches ? -1 : -4);
  const sum = (get) => recent.reduce((total, one) => total + get(one), 0);
  const seconds = sum((one) => one.seconds);
  const ticks = sum((one) => one.ticks);
  const tokens = sum((one) => one.exits.reduce((a, b) => a + b, 0));
  const loops = sum((one) => one.exits.reduce((a, b, i) => a + b * (i + 1), 0));
  const busy = sum((one) => one.busy) / Math.max(ticks * facts.lanes, 1);
  const speed = (tokens / seconds).toFixed(tokens / seconds < 10 ? 1 : 0);
  const mean = tokens ? (loops / tokens).toFixed(2) : "–";
  const waits = news.waiting ? `, ${news.waiting} wait` : "";
  $("speed").textContent = speed;
  $("mean").textContent = mean;
  $("occupancy").textContent = `${Math.round(100 * busy)} %`;
  $("requests").textContent = `${news.running}${waits}`;
  const bars = $("grid").querySelectorAll("b");
  bars.forEach((bar, i) => {
    const share = news.grid[i] / Math.max(news.ticks, 1);
    bar.style.transform = `scaleX(${share.toFixed(2)})`;
  });
  const active = Array.from({ length: facts.slots }, (_, slot) =>
    news.grid.slice(slot * facts.loops, (slot + 1) * facts.loops).some(Boolean),
  ).filter(Boolean).length;
  const more = facts.slots > SHOWN_SLOTS ? ` The first ${SHOWN_SLOTS} are shown.` : "";
  $("grid").setAttribute(
    "aria-label",
    `${active} of ${facts.slots} slots at work, ${speed} tokens per second, ` +
      `${mean} loops on average.${more}`,
  );
}

// Depth in the form.

function settle() {
  const fixed = $("lossless").checked && !facts.lossless;
  const measure = facts.measure;
  $("threshold").disabled = !measure || fixed;
  $("own").disabled = !measure || fixed || !thresholdMoved;
  $("loops").disabled = !facts.can_exit || fixed;
  const own = measure?.own.map((value) => value.toFixed(3)).join(", ");
  $("threshold-value").textContent = !measure
    ? "none"
    : thresholdMoved ? Number($("threshold").value).toFixed(3) : `${own} (server’s own)`;
  $("threshold").setAttribute("aria-valuetext", $("threshold-value").textContent);
  $("threshold-hint").textContent = measure
    ? `A token leaves when its ${measure.name} score is above it.`
    : "This server has no exit measure with a threshold.";
  $("loops-value").textContent = `${$("loops").value} of ${facts.loops}`;
}

function depth() {
  if (facts.lossless || !$("lossless").checked) {
    const asked = {};
    if (facts.measure && thresholdMoved) {
      asked.exit_measure_threshold = Number($("threshold").value);
    }
    if (Number($("loops").value) < facts.loops) asked.max_loops = Number($("loops").value);
    return asked;
  }
  return facts.can_exit ? { lossless: true } : {};
}

// The answer.

async function send() {
  if (running || !facts || !$("ask").reportValidity()) return;
  const mine = (running = new AbortController());
  const chat = document.querySelector("input[name=kind]:checked").value === "chat";
  const text = $("prompt").value;
  $("problem").textContent = "";
  $("send").disabled = true;
  $("stop").disabled = false;
  if (!chat) clear();
  const answer = newAnswer(text);
  const spoken = new Announcer();
  let end = "the connection broke, so the answer is incomplete";
  try {
    const messages = [...talk, { role: "user", content: text }];
    const read = await call("tokenize", chat ? { messages } : { prompt: text }, mine.signal);
    answer.prompt = (await read.json()).tokens;
    const room = Math.max(facts.context - answer.prompt.length, 1);
    const body = {
      prompt: answer.prompt,
      max_tokens: Math.min(Number($("max-tokens").value), room),
      temperature: Number($("temperature").value),
      stream: true,
      logprobs: 0,
      return_exit_loops: true,
      return_token_ids: true,
      ...depth(),
    };
    const stream = await call("v1/completions", body, mine.signal);
    answer.began = performance.now();
    for await (const message of events(stream)) {
      if (message === "[DONE]") {
        end = "";
        break;
      }
      const record = JSON.parse(message);
      if (record.error) throw new Problem(record.error.code, record.error.message);
      const fresh = grow(answer, record.choices[0]);
      spoken.add(fresh);
      summarise(answer, "");
    }
    if (end) report(new Problem(0, end));
    else if (chat) {
      talk = [...messages, { role: "assistant", content: answer.text.join("") }];
      $("prompt").value = "";
    }
  } catch (error) {
    if (mine.signal.aborted) end = "stopped";
    else {
      report(error instanceof Problem ? error : new Problem(0, end));
      end = "failed";
    }
  }
  summarise(answer, end);
  spoken.add(` ${$("summary").textContent}`);
  spoken.finish();
  running = null;
  answer.over = true;
  if (focused === answer) chances(answer);
  $("send").disabled = false;
  $("stop").disabled = true;
}

function newAnswer(text) {
  const box = make("div", "");
  box.className = "tokens";
  box.tabIndex = 0;
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "Answer by token. Arrow keys choose a token.");
  const asked = make("p", text);
  asked.className = "asked";
  $("turns").append(asked, box);
  const answer = {
    box, number: answers.length, text: [], tokens: [], prompt: [], ids: [], chosen: -1, began: 0,
  };
  answers.push(answer);
  box.addEventListener("keydown", (event) => {
    const last = answer.tokens.length - 1;
    const moves = {
      ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -last, End: last,
    };
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    choose(answer, Math.min(Math.max(answer.chosen + moves[event.key], 0), last));
  });
  box.addEventListener("focus", () => {
    if (answer.tokens.length) choose(answer, Math.max(answer.chosen, 0));
  });
  for (const kind of ["pointerover", "click"]) {
    box.addEventListener(kind, (event) => {
      const place = answer.tokens.findIndex((token) => token.span === event.target);
      if (place >= 0) choose(answer, place);
    });
  }
  return answer;
}

// Append what a chunk brings; returns the new text.
function grow(answer, choice) {
  answer.text.push(...choice.text); // by code point, as the server counts
  const { text_offset: offsets, token_logprobs: logprobs } = choice.logprobs;
  answer.ids.push(...choice.token_ids);
  const old = answer.tokens.length;
  offsets.forEach((offset, i) => {
    answer.tokens.push({ offset, loops: choice.exit_loops[i], logprob: logprobs[i], span: null });
  });
  // The last token's text may still grow, when a character has several tokens.
  for (let i = Math.max(old - 1, 0); i < answer.tokens.length; i++) show(answer, i);
  return choice.text;
}

function show(answer, i) {
  const token = answer.tokens[i];
  token.piece = answer.text.slice(token.offset, answer.tokens[i + 1]?.offset).join("");
  if (!token.span) {
    token.span = make("span", "");
    token.span.id = `token-${answer.number}-${i}`;
    token.span.dataset.loop = token.loops;
    token.span.style.backgroundColor = shade(token.loops);
    token.span.setAttribute("role", "option");
    token.span.setAttribute("aria-selected", "false");
    answer.box.append(token.span);
  }
  token.span.textContent = token.piece.replaceAll("\n", "↵") || "·";
  token.span.className = token.piece.includes("\n") ? "ends" : "";
  token.span.setAttribute("aria-label", words(token));
}

function words(token) {
  const piece = token.piece.trim() ? `“${token.piece.replaceAll("\n", "↵")}”` : "white space";
  const chance = percent(Math.exp(token.logprob));
  return `${piece}: left after loop ${token.loops} of ${facts.loops}, probability ${chance}`;
}

function choose(answer, place) {
  for (const other of answers) {
    other.tokens[other.chosen]?.span.setAttribute("aria-selected", "false");
  }
  answer.chosen = place;
  focused = answer;
  const token = answer.tokens[place];
  token.span.setAttribute("aria-selected", "true");
  answer.box.setAttribute("aria-activedescendant", token.span.id);
  $("token").hidden = false;
  $("token-words").textContent = words(token);
  chances(answer);
}

// Show the chosen token's probability after every loop. They are asked for once an answer is over.
async function chances(answer) {
  const list = $("token-loops");
  list.replaceChildren();
  if (!answer.over || !answer.ids.length) return;
  answer.chances ??= call("by_loop", {
    tokens: [...answer.prompt, ...answer.ids], start: answer.prompt.length,
  }).then((response) => response.json());
  const place = answer.chosen;
  let found;
  try {
    found = (await answer.chances).probabilities[place];
  } catch {
    answer.chances = undefined; // busy, or not served: the loop and one probability are shown
    return;
  }
  if (!found || answer !== focused || place !== answer.chosen) return;
  list.replaceChildren(
    ...found.map((chance, i) => {
      const item = make("li", "");
      const box = make("span", `${i + 1}`);
      box.className = "shade";
      box.style.backgroundColor = shade(i + 1);
      const bar = make("meter", "");
      Object.assign(bar, { min: 0, max: 1, value: chance });
      bar.setAttribute("aria-label", `Probability after ${count(i + 1, "loop")}`);
      item.append(box, bar, make("span", percent(chance)));
      return item;
    }),
  );
}

function summarise(answer, end) {
  const total = answer.tokens.length;
  const seconds = (performance.now() - answer.began) / 1000;
  const parts = [];
  if (total) {
    const mean = answer.tokens.reduce((sum, token) => sum + token.loops, 0) / total;
    parts.push(count(total, "token"), `${mean.toFixed(2)} loops on average`);
    parts.push(`${(total / seconds).toFixed(1)} tokens per second`);
    $("answer").dataset.meanLoops = mean.toFixed(4);
  }
  if (end) parts.push(end);
  $("summary").textContent = parts.length ? sentence(parts.join(", ")) : "";
  legend(answer);
}

function legend(answer) {
  const tokens = answer?.tokens ?? [];
  $("legend").replaceChildren(
    ...Array.from({ length: facts.loops }, (_, i) => {
      const number = tokens.filter((token) => token.loops === i + 1).length;
      const share = number / Math.max(tokens.length, 1);
      const item = make("li", "");
      const box = make("span", `${i + 1}`);
      box.className = "shade";
      box.style.backgroundColor = shade(i + 1);
      item.append(box, `${i + 1 > 1 ? "loops" : "loop"}: ${percent(share)}`);
      return item;
    }),
  );
}

function clear() {
  $("turns").replaceChildren();
  for (const id of ["summary", "spoken", "token-words", "problem"]) $(id).textContent = "";
  $("token").hidden = true;
  answers = [];
  talk = [];
}

// Reads new text aloud in batches.
class Announcer {
  constructor() {
    this.rest = "";
    $("spoken").textContent = "";
    this.timer = setInterval(() => this.flush(), SPOKEN_EVERY);
  }
  add(text) {
    this.rest += text;
  }
  flush() {
    if (this.rest) $("spoken").append(make("span", this.rest));
    this.rest = "";
  }
  finish() {
    clearInterval(this.timer);
    this.flush();
  }
}

// Small things.

function make(name, text) {
  const element = document.createElement(name);
  element.textContent = text;
  return element;
}

const count = (n, name) => `${n} ${name}${n === 1 ? "" : "s"}`;
const percent = (share) => `${Math.round(100 * share)} %`;

function shade(loop) {
  const place = ((loop - 1) / Math.max(facts.loops - 1, 1)) * (SHADES.length - 1);
  const low = Math.min(Math.floor(place), SHADES.length - 2);
  const parts = [1, 3, 5].map((i) => {
    const [a, b] = [SHADES[low], SHADES[low + 1]].map((c) => parseInt(c.slice(i, i + 2), 16));
    return Math.round(a + (b - a) * (place - low));
  });
  return `rgb(${parts})`;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  clear();
  if (facts) legend();
  $("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && event.ctrlKey && event.target === $("prompt")) send();
});
$("threshold").addEventListener("input", () => {
  thresholdMoved = true;
  settle();
});
$("own").addEventListener("click", () => {
  thresholdMoved = false;
  $("threshold").value = facts.measure.own[0];
  settle();
  $("threshold").focus();
});
for (const id of ["loops", "lossless"]) $(id).addEventListener("input", settle);
$("key").addEventListener("change", watch);
$("pause").addEventListener("click", () => {
  const paused = $("pause").getAttribute("aria-pressed") !== "true";
  $("pause").setAttribute("aria-pressed", `${paused}`);
  if (paused) watching?.abort();
  else watch();
});
document.addEventListener("visibilitychange", () => {
  if ($("pause").getAttribute("aria-pressed") === "true") return;
  if (document.hidden) watching?.abort();
  else watch();
});
watch();
