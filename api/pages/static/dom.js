// Elements from data. Text is added as text, never as markup, so that the name of a job can't become a script.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "g", "rect", "line", "path", "circle", "text", "title", "polyline"]);

/** h("a", {href: "#/jobs", class: "brand"}, "Jobs", …): attributes, `onclick`-like listeners, and children (null is left out). */
export function h(tag, attributes = {}, ...children) {
  const svg = SVG_TAGS.has(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" && !svg) element.value = value;
    else if (name === "checked" || name === "disabled" || name === "selected") element[name] = Boolean(value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/** Update a list of elements to match items. Only elements whose item has changed are replaced, so that focus and selection stay. */
export function keyed(parent, items, key, draw) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  let before = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    const content = JSON.stringify(item);
    let element = known.get(name);
    if (element === undefined || element.content !== content) {
      const fresh = draw(item);
      fresh.dataset.key = name;
      fresh.content = content;
      if (element !== undefined) {
        const held = element.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
        if (before === element) before = fresh;
        element.replaceWith(fresh);
        if (held !== undefined) fresh.querySelector(`[data-focus="${held}"]`)?.focus();
      }
      element = fresh;
    }
    known.delete(name);
    if (element === before) before = before.nextElementSibling;
    else parent.insertBefore(element, before);
  }
  for (const left of known.values()) left.remove();
}

export function announce(text) {
  document.getElementById("announce").textContent = text;
}
