"use strict";
// Texts from clients (request ids) enter the page as text only, never as markup. A key travels in a header only, never in an address.
const EVERY_MS = 1000, ANSWER_LIMIT_MS = 5000, HISTORY_MS = 300000, SHORTEST_MS = 60000, GAP_MS = 5000;
const KEY = "dyncp-key";
const history = []; // {time, kv, homes}: largest / mean, null where nothing is there; bounded by HISTORY_MS
let lastAnswer = null, readings = 0;

const byId = (id) => document.getElementById(id);
const count = (value) => value.toLocaleString("en-US");
const percent = (share) => `${Math.round(100 * share)} %`;
const clock = (time) => new Date(time).toLocaleTimeString([], { hour12: false });

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function row(cells) {
  const made = document.createElement("tr");
  for (const cell of cells) {
    if (cell instanceof HTMLElement) made.append(cell);
    else made.append(element("td", cell));
  }
  return made;
}

function bar(parts, total, label, className = "bar") {
  const made = element("div", "", className);
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  for (const [kind, value] of parts) {
    const part = element("span", "", kind);
    part.style.width = `${total ? (100 * value) / total : 0}%`;
    part.dataset.tokens = value;
    made.append(part);
  }
  return made;
}

function cellOf(...children) {
  const made = element("td", "", "wide");
  made.append(...children);
  return made;
}

function balance(values) {
  const sum = values.reduce((total, value) => total + value, 0);
  return sum ? (Math.max(...values) * values.length) / sum : null;
}

function showInstances(instances) {
  byId("instances").replaceChildren(...instances.map((load) => {
    const retained = load.retained_tokens || 0;
    const own = Math.max(0, load.kv_tokens - load.guest_tokens - retained);
    const parts = [["own", own], ["guest", load.guest_tokens], ["retained", retained]];
    const label = `instance ${load.rank}: own ${count(own)}, guests ${count(load.guest_tokens)}, retained ${count(retained)}, pool ${count(load.pool_tokens)}`;
    const figures = [count(load.kv_tokens), percent(load.kv_tokens / load.pool_tokens), count(load.guest_tokens), count(load.home_requests), count(load.queued)];
    return row([`${load.rank}`, cellOf(bar(parts, load.pool_tokens, label)), ...figures]);
  }));
}

function showDegrees(degrees) {
  const entries = Object.entries(degrees).map(([degree, number]) => [Number(degree), number]).sort((a, b) => a[0] - b[0]);
  const most = Math.max(1, ...entries.map(([, number]) => number));
  byId("degrees").replaceChildren(...entries.map(([degree, number]) =>
    row([`${degree}`, cellOf(bar([["own", number]], most, `${number} requests of degree ${degree}`)), count(number)])));
}

function showLongest(requests) {
  if (!getSelection().isCollapsed) return; // somebody is about to copy an id
  byId("longest").replaceChildren(...requests.map((entry) => {
    const total = entry.shards.reduce((sum, shard) => sum + shard.tokens, 0);
    const names = entry.shards.map((shard) => `${shard.rank}: ${count(shard.tokens)}`).join(", ");
    const parts = entry.shards.map((shard) => [shard.rank === entry.home ? "own" : "guest", shard.tokens]);
    const degree = entry.degree_start === entry.degree_end ? `${entry.degree_end}` : `${entry.degree_start} → ${entry.degree_end}`;
    const id = element("td", entry.rid, "id");
    id.title = entry.rid;
    const shards = entry.shards.length ? cellOf(bar(parts, total, names, "bar shards"), element("div", names, "parts")) : cellOf();
    return row([id, element("td", entry.state, "text"), count(entry.prompt_tokens), count(entry.output_tokens), `${entry.home}`, degree, shards]);
  }));
}

function remember(time, instances) {
  const values = (name) => balance(instances.map((load) => load[name]));
  history.push({ time, kv: values("kv_tokens"), homes: values("home_requests") });
  while (history[0].time < time - HISTORY_MS) history.shift();
}

function linePath(name, now, span, top) {
  let path = "", before = null;
  for (const point of history) {
    const value = point[name];
    if (value !== null) {
      const x = 600 * (1 - (now - point.time) / span), y = 146 - (142 * (value - 1)) / (top - 1);
      path += `${before !== null && point.time - before < GAP_MS ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    }
    before = value === null ? null : point.time;
  }
  return path;
}

function showBalance(now) {
  const shown = (value) => (value === null ? "-" : value.toFixed(2));
  const last = history[history.length - 1];
  byId("balance-kv").textContent = shown(last.kv);
  byId("balance-homes").textContent = shown(last.homes);
  const top = Math.max(2, ...history.map((point) => Math.max(point.kv || 0, point.homes || 0)));
  const span = Math.max(SHORTEST_MS, now - history[0].time);
  byId("balance-top").textContent = shown(top);
  byId("balance-from").textContent = span < 2 * SHORTEST_MS ? `${Math.round(span / 1000)} s ago` : `${Math.round(span / 60000)} min ago`;
  byId("balance").replaceChildren(...["homes", "kv"].map((name) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", `line-${name}`);
    path.setAttribute("d", linePath(name, now, span, top));
    return path;
  }));
}

function showStatus(text, lost) {
  byId("status").textContent = text;
  byId("status").classList.toggle("lost", lost);
  byId("figures").classList.toggle("lost", lost);
}

function show(load) {
  const now = Date.now();
  remember(now, load.instances);
  showInstances(load.instances);
  showDegrees(load.degrees);
  showLongest(load.longest);
  showBalance(now);
  lastAnswer = now;
  showStatus(`live, ${clock(now)}`, false);
  byId("key-form").hidden = true;
  document.body.dataset.readings = ++readings;
}

function showLost(reason) {
  showStatus(lastAnswer === null ? `no answer yet (${reason})` : `no answer since ${clock(lastAnswer)} (${reason})`, true);
}

function askForKey(note) {
  showStatus("a key is needed", true);
  byId("key-note").textContent = note;
  byId("key-form").hidden = false;
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return new Headers(key ? { Authorization: `Bearer ${key}` } : {}); // throws for what a header cannot carry
}

async function read() {
  let sent;
  try {
    sent = headers();
  } catch {
    sessionStorage.removeItem(KEY);
    return askForKey("That key has characters that no header can carry.");
  }
  try {
    const answer = await fetch("load", { headers: sent, cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(ANSWER_LIMIT_MS) });
    if (answer.status === 401 || answer.status === 403) {
      return askForKey(sessionStorage.getItem(KEY) ? "The server does not take that key." : "It is kept in this tab alone.");
    }
    if (!answer.ok) return showLost(`HTTP ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    showLost(error.name === "TimeoutError" ? "the server is silent" : "the server cannot be reached");
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  read();
});

async function run() {
  for (;;) {
    const began = Date.now();
    if (!document.hidden) await read();
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, EVERY_MS - (Date.now() - began))));
  }
}
run();
