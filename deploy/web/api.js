// Requests to the gateway, the light or dark theme, and small helpers to build elements.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function get(path, parameters = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value != null));
  const response = await fetch(query.size ? `${path}?${query}` : path, { cache: "no-cache" });
  const body = await response.json().catch(() => ({}));
  if (!response.ok && !("checks" in body)) throw new Refused(response.status, body.error ?? response.statusText);
  return body;
}

// Text only ever enters the page as text: a symbol's name is whatever a sender made of it.
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child != null));
  return node;
}

export const byId = (id) => document.getElementById(id);

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

export function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch {
    // Private windows may refuse: the choice then lasts as long as the page.
  }
}

export function remembered(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

export function theme(onChange = () => {}) {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = remembered("theme");
  if (chosen) root.dataset.theme = chosen;
  byId("theme").addEventListener("click", () => {
    const now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    remember("theme", root.dataset.theme);
    onChange();
  });
  dark.addEventListener("change", onChange);
}
