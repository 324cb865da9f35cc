// The operations of /openapi.json, each with a form to try it.

import { byId, element, get, theme } from "./api.js";

const SHOWN = 20_000; // characters of an answer

theme();
const api = await get("/openapi.json");
byId("about").textContent = api.info.description.replaceAll("`", "");

const resolve = (schema) => (schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema);

for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) {
    byId("operations").append(section(path, method, operation));
    const link = element("a", { className: "pill", href: `#${operation.operationId}`, textContent: operation.operationId });
    link.addEventListener("click", () => (byId(operation.operationId).open = true));
    byId("nav").append(link);
  }
}
for (const [name, schema] of Object.entries(api.components.schemas).sort()) {
  byId("schemas").append(
    element("details", { className: "card" },
      element("summary", {}, element("code", { textContent: name }), element("span", { className: "note", textContent: schema.description ?? "" })),
      element("div", { className: "body" }, element("pre", { textContent: JSON.stringify(schema, null, 2) })),
    ),
  );
}

function section(path, method, operation) {
  const answer = element("pre", { hidden: true });
  return element("details", { className: "card", id: operation.operationId },
    element("summary", {},
      element("span", { className: `method ${method}`, textContent: method.toUpperCase() }),
      element("code", { textContent: path }),
      element("span", { className: "note", textContent: operation.summary }),
    ),
    element("div", { className: "body" },
      operation.description ? element("p", { textContent: operation.description.replaceAll("`", "") }) : null,
      form(path, method, operation, answer),
      answer,
      answers(operation),
    ),
  );
}

function form(path, method, operation, answer) {
  const parameters = (operation.parameters ?? []).filter((parameter) => parameter.in !== "header");
  const inputs = parameters.map((parameter) => {
    const schema = resolve(parameter.schema);
    const example = schema.examples?.[0] ?? "";
    const input = element("input", {
      name: parameter.name,
      required: Boolean(parameter.required),
      value: parameter.required ? example : "",
      placeholder: String(schema.default ?? example),
      title: parameter.description ?? "",
    });
    return element("label", { className: "field" }, element("span", { textContent: parameter.name }), input);
  });
  const media = operation.requestBody?.content["application/json"];
  const body = media ? element("textarea", { name: "body", value: JSON.stringify(media.example, null, 2), spellcheck: false, ariaLabel: "Body" }) : null;
  const node = element("form", {}, ...inputs, body, element("button", { className: "button", type: "submit", textContent: "Send" }));
  node.addEventListener("submit", (event) => {
    event.preventDefault();
    send(path, method, parameters, node, body?.value, answer);
  });
  return node;
}

async function send(path, method, parameters, node, body, answer) {
  const query = new URLSearchParams();
  let address = path;
  for (const { name, in: place } of parameters) {
    const value = node.elements[name].value.trim();
    if (place === "path") address = address.replace(`{${name}}`, encodeURIComponent(value));
    else if (value) query.set(name, value);
  }
  const headers = {};
  if (byId("key").value) headers["X-API-Key"] = byId("key").value;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  answer.hidden = false;
  answer.textContent = "…";
  const started = performance.now();
  const stop = new AbortController();
  try {
    const response = await fetch(query.size ? `${address}?${query}` : address, { method: method.toUpperCase(), headers, body, signal: stop.signal });
    const head = `${response.status} ${response.statusText} in ${Math.round(performance.now() - started)} ms\n\n`;
    if (response.headers.get("Content-Type")?.startsWith("text/event-stream")) await follow(response, head, answer, stop);
    else answer.textContent = head + shorten(pretty(await response.text()));
  } catch (error) {
    answer.textContent = `No answer: ${error.message}`;
  }
}

// An endless stream: what comes within ten seconds.
async function follow(response, head, answer, stop) {
  const timer = setTimeout(() => stop.abort(), 10_000);
  let text = "";
  try {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
      text += piece.value;
      answer.textContent = head + shorten(text);
    }
  } catch {
    answer.textContent = `${head}${shorten(text)}\n(closed after ten seconds)`;
  } finally {
    clearTimeout(timer);
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

const shorten = (text) => (text.length > SHOWN ? `${text.slice(0, SHOWN)}\n… ${text.length - SHOWN} characters more` : text);

function answers(operation) {
  const rows = Object.entries(operation.responses).map(([status, response]) => {
    const shape = Object.values(response.content ?? {})[0]?.schema?.$ref?.split("/").at(-1) ?? "";
    return element("tr", {}, ...[status, response.description, shape].map((textContent) => element("td", { textContent })));
  });
  return element("div", { className: "scroll" }, element("table", {}, element("tbody", {}, ...rows)));
}
