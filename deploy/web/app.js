// The page: live signals, the chosen series' chart, models and health.

import { byId, element, get, Refused, remember, remembered, theme } from "./api.js";
import { Chart, clock, day, digits } from "./chart.js";

const TIMEFRAMES = ["M1", "M2", "M3", "M4", "M5", "M6", "M10", "M12", "M15", "M20", "M30",
  "H1", "H2", "H3", "H4", "H6", "H8", "H12", "D1", "W1", "MN1"];
const KEPT = 1000; // signals in memory
const SHOWN = 200; // rows of the table
const HEALTH_EVERY = 10_000; // ms
const SETTLE = 400; // ms that the archive gets before a new candle is read from it

const REASONS = {
  warming: "warming up", no_model: "no model", unproven: "unproven", no_edge: "no edge", stale_feed: "stale feed",
  spread: "spread too wide", out_of_distribution: "unlike its training", model_expired: "model expired",
};

const chart = new Chart(byId("chart"), byId("readout"));
const signals = new Map(); // id → signal, oldest arrival first
const arrived = new Set(); // ids not painted yet
const chosen = { symbol: remembered("symbol") ?? "", timeframe: remembered("timeframe") ?? "M1" };
let stream = null;
let painting = false;
let reading = null;
let chartRun = 0;

// --- signals --------------------------------------------------------------------------------------------------

function keep(signal, fresh) {
  signals.delete(signal.id);
  signals.set(signal.id, signal);
  if (signal.supersedes) signals.delete(signal.supersedes);
  while (signals.size > KEPT) signals.delete(signals.keys().next().value);
  if (fresh) arrived.add(signal.id);
}

async function readSignals() {
  const { signals: newest } = await get("/signals", { timeframe: chosen.timeframe, limit: KEPT });
  for (const signal of newest.reverse()) keep(signal, false);
  paint();
}

function openStream() {
  stream?.close();
  stream = new EventSource("/signals/stream");
  stream.onopen = () => pill("live", "ok", "live");
  stream.onmessage = (event) => {
    const signal = JSON.parse(event.data);
    keep(signal, true);
    if (!chosen.symbol && signal.timeframe === chosen.timeframe) choose({ symbol: signal.symbol });
    if (signal.symbol === chosen.symbol && signal.timeframe === chosen.timeframe) soonReadCandles();
    paint();
  };
  stream.addEventListener("resync", () => attempt(readSignals));
  stream.onerror = () => {
    pill("live", "degraded", "reconnecting");
    // A browser gives up on an answer that is no stream (a gateway that restarts): begin again.
    if (stream.readyState === EventSource.CLOSED) setTimeout(() => attempt(start), 3000);
  };
}

function paint() {
  if (painting) return;
  painting = true;
  requestAnimationFrame(() => {
    painting = false;
    paintRows();
    paintSymbols();
    chart.signals = new Map(ofSeries().map((signal) => [Date.parse(signal.ts), signal]));
    chart.draw();
  });
}

const ofSeries = () =>
  [...signals.values()].filter((signal) => signal.symbol === chosen.symbol && signal.timeframe === chosen.timeframe);

function paintRows() {
  const trades = byId("trades").checked;
  const newest = [...signals.values()]
    .filter((signal) => !trades || signal.label !== 0)
    .reverse()
    .slice(0, SHOWN);
  byId("rows").replaceChildren(...newest.map(row));
  byId("rows-hint").hidden = newest.length > 0;
  const count = [...signals.values()].filter((signal) => signal.label !== 0).length;
  byId("signals-note").textContent = signals.size ? `${signals.size} newest, ${count} to trade` : "";
  arrived.clear();
}

function row(signal) {
  const at = new Date(signal.ts);
  const today = day(at) === day(new Date());
  const [kind, text] =
    signal.label > 0 ? ["up", "▲ up"] : signal.label < 0 ? ["down", "▼ down"] : ["", REASONS[signal.abstain] ?? "no trade"];
  const probability = element("td", { className: "mono" });
  if (signal.prob_up != null) {
    probability.append(
      element("meter", { min: 0, max: 1, value: signal.prob_up, ariaLabel: "probability of a rise" }),
      signal.prob_up.toFixed(3),
    );
  } else {
    probability.append("–");
  }
  const node = element(
    "tr",
    { className: arrived.has(signal.id) ? "fresh" : "", title: `${signal.id}\nmade ${signal.created_at}` },
    element("td", { textContent: today ? clock(at) : `${day(at).slice(5)} ${clock(at)}` }),
    element("td", {}, signal.symbol, " ", element("span", { className: "note", textContent: signal.timeframe })),
    element("td", {}, element("span", { className: `tag ${kind}`, textContent: text })),
    probability,
    element("td", { className: "wide note", textContent: signal.model_version ?? signal.model_name }),
  );
  node.addEventListener("click", () => choose({ symbol: signal.symbol, timeframe: signal.timeframe }));
  return node;
}

function paintSymbols() {
  const known = [...new Set([...signals.values()].map((signal) => signal.symbol))].sort();
  const shown = [...byId("symbols").children].map((option) => option.value);
  if (known.join("\n") !== shown.join("\n")) {
    byId("symbols").replaceChildren(...known.map((value) => element("option", { value })));
  }
}

// --- the chart ------------------------------------------------------------------------------------------------

function choose(choice) {
  Object.assign(chosen, choice);
  remember("symbol", chosen.symbol);
  remember("timeframe", chosen.timeframe);
  byId("symbol").value = chosen.symbol;
  byId("timeframe").value = chosen.timeframe;
  attempt(readCandles);
}

function soonReadCandles() {
  reading ??= setTimeout(() => {
    reading = null;
    attempt(readCandles);
  }, SETTLE);
}

async function readCandles() {
  const run = ++chartRun;
  const { symbol, timeframe } = chosen;
  byId("pair").textContent = symbol ? `${symbol} ${timeframe}` : "No series yet";
  let candles = [];
  let hint = symbol ? "" : "The first series that sends candles appears here.";
  if (symbol) {
    try {
      ({ candles } = await get("/candles", { symbol, timeframe, limit: chart.room }));
      if (!candles.length) hint = `The archive holds no ${timeframe} candle of ${symbol} yet.`;
    } catch (error) {
      if (!(error instanceof Refused) || error.status === 401) throw error;
      hint = error.message;
      candles = chart.series === `${symbol} ${timeframe}` ? chart.candles : [];
    }
  }
  if (run !== chartRun) return; // another choice was made meanwhile
  chart.series = `${symbol} ${timeframe}`;
  chart.show(candles, ofSeries());
  byId("chart-hint").textContent = hint;
  byId("chart-hint").hidden = !hint || candles.length > 0;
  paintPrice(candles);
}

function paintPrice(candles) {
  const [last, before] = [candles.at(-1), candles.at(-2)];
  byId("price").textContent = last ? last.close.toFixed(digits(last.close)) : "";
  const change = last && before ? (last.close / before.close - 1) * 100 : null;
  byId("change").textContent = change === null ? "" : `${change >= 0 ? "+" : ""}${change.toFixed(3)} %`;
  byId("change").className = change === null ? "" : change >= 0 ? "up" : "down";
}

// --- models and health ----------------------------------------------------------------------------------------

async function readModels() {
  let models;
  try {
    ({ models } = await get("/models"));
  } catch (error) {
    if (!(error instanceof Refused) || error.status === 401) throw error;
    byId("models").replaceChildren(element("li", { className: "empty", textContent: error.message }));
    return;
  }
  const order = ["champion", "provisional", "shadow", "candidate", "retired", "refused"];
  const first = models.sort((a, b) => order.indexOf(a.state) - order.indexOf(b.state)).slice(0, 8);
  const empty = element("li", { className: "empty" }, "No model yet: ", element("code", { textContent: "mt5 train --timeframe M1" }));
  byId("models").replaceChildren(...(first.length ? first.map(modelItem) : [empty]));
}

function modelItem(model) {
  const serving = model.state === "champion" || model.state === "provisional";
  const since = model.activated_at ?? model.created_at;
  return element(
    "li",
    {},
    element("strong", { textContent: model.model_name }),
    element("span", { className: "mono", textContent: model.version }),
    element("span", { className: `tag ${serving ? "on" : ""}`, textContent: model.state }),
    element("small", {
      textContent: `${serving ? "serves since" : "made"} ${day(new Date(since))} ${clock(new Date(since))} UTC${model.reason ? `: ${model.reason}` : ""}`,
    }),
  );
}

async function readHealth() {
  const report = await get("/health");
  pill("status", report.status, report.status);
  byId("checks").replaceChildren(
    ...Object.entries(report.checks).map(([name, check]) => {
      const item = element("li", {}, element("strong", { textContent: name }), element("small", { textContent: check.detail }));
      item.dataset.state = check.status;
      item.title = check.status;
      return item;
    }),
  );
}

function pill(id, state, text) {
  byId(id).dataset.state = state;
  byId(id).textContent = text;
}

// --- starting -------------------------------------------------------------------------------------------------

async function attempt(task) {
  try {
    await task();
  } catch (error) {
    if (error instanceof Refused && error.status === 401) askForKey();
    else if (error instanceof TypeError) pill("status", "down", "unreachable"); // fetch's way to say: no answer
    else pill("status", "degraded", error.message);
  }
}

function askForKey() {
  stream?.close();
  pill("live", "wait", "locked");
  if (!byId("login").open) byId("login").showModal();
}

byId("login").addEventListener("cancel", (event) => event.preventDefault());
byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const response = await fetch("/session", { method: "POST", headers: { "X-API-Key": byId("key").value } }).catch(() => null);
  byId("login-error").textContent = response?.ok ? "" : response ? "This key is not valid." : "The gateway does not answer.";
  if (!response?.ok) return;
  byId("key").value = "";
  byId("login").close();
  attempt(start);
});

byId("timeframe").append(...TIMEFRAMES.map((name) => element("option", { textContent: name })));
byId("symbol").addEventListener("change", (event) => choose({ symbol: event.target.value.trim() }));
byId("symbol").addEventListener("focus", (event) => event.target.select());
byId("timeframe").addEventListener("change", (event) => {
  choose({ timeframe: event.target.value });
  attempt(readSignals);
});
byId("trades").addEventListener("change", paint);
theme(() => chart.draw());

async function refresh() {
  if (byId("login").open) return;
  await attempt(readHealth);
  await attempt(readModels);
}

async function start() {
  await readSignals();
  if (!chosen.symbol) chosen.symbol = [...signals.values()].at(-1)?.symbol ?? "";
  choose({});
  openStream();
  await refresh();
}

setInterval(refresh, HEALTH_EVERY);
attempt(start);
