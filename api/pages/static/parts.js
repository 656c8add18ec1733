// Parts that several views share.

import { Refused } from "./api.js";
import { announce, h } from "./dom.js";
import { duration, percent, words } from "./format.js";

const TONES = {
  succeeded: "good", accepted: "good", verified: "good", ready: "good", idle: "good", active: "good", delivered: "good",
  failed: "bad", rejected: "bad", lost: "bad", disabled: "bad", revoked: "bad",
  running: "live", busy: "live", cancelling: "live", fetching: "live", uploading: "live", hashing: "live",
};

export function badge(text) {
  return h("span", { class: `badge ${TONES[text] || "calm"}` }, words(text));
}

export function progress(job) {
  const name = `${job.phase ? words(job.phase) : job.state}, ${percent(job.progress)}`;
  return h("div", { class: "progress" },
    h("progress", { max: 1, value: job.progress, "aria-label": name }),
    h("small", {}, job.phase ? words(job.phase) : job.state, " · ", percent(job.progress), job.eta_s ? ` · ${duration(job.eta_s)} left` : ""));
}

export function trouble(error) {
  const problem = error instanceof Refused ? error.problem : { detail: String(error.message || error) };
  return h("div", { class: "notice bad", role: "alert" },
    h("p", {}, h("strong", {}, problem.detail || problem.title)),
    problem.hint ? h("p", {}, problem.hint) : null,
    problem.errors?.length ? h("ul", {}, problem.errors.map((fault) => h("li", {}, h("code", {}, fault.at ?? fault.loc?.join(".") ?? ""), " ", fault.problem ?? fault.msg ?? ""))) : null,
    problem.request_id ? h("p", { class: "quiet" }, "Request ", h("code", {}, problem.request_id)) : null);
}

export function empty(title, ...rest) {
  return h("div", { class: "empty" }, h("p", {}, h("strong", {}, title)), rest);
}

export function heading(title, ...tools) {
  return h("div", { class: "heading" }, h("h1", { tabindex: "-1" }, title), h("div", { class: "tools" }, tools));
}

/** A table. Its cells carry their column's name, so that a narrow screen can show each row as a card. */
export function table(caption, columns, rows, body = h("tbody")) {
  body.append(...rows);
  return h("div", { class: "wide" },
    h("table", {},
      h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, columns.map((column) => h("th", { scope: "col" }, column || h("span", { class: "unseen" }, "Actions"))))),
      body));
}

export function row(columns, cells, attributes = {}) {
  return h("tr", attributes, cells.map((cell, at) => h(at === 0 ? "th" : "td", at === 0 ? { scope: "row", "data-of": columns[at] } : { "data-of": columns[at] }, cell)));
}

export function facts(pairs) {
  return h("dl", {}, pairs.filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

let numbered = 0;

/** A labelled field. `help` describes it to screen readers too. */
export function field(label, control, help = "") {
  numbered += 1;
  control.id ||= `field-${numbered}`;
  const note = h("small", { id: `${control.id}-help`, class: "help" }, help);
  control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, note);
}

/** A button that is disabled while its action runs, and shows the error where it fails. */
export function button(text, act, { tone = "", label, focus } = {}) {
  const element = h("button", { type: "button", class: tone, "aria-label": label, "data-focus": focus }, text);
  element.addEventListener("click", async () => {
    element.disabled = true;
    try {
      await act();
    } catch (error) {
      say(error);
    } finally {
      element.disabled = false;
    }
  });
  return element;
}

/** Show an error in a dialog. */
export function say(error) {
  const dialog = h("dialog", { "aria-labelledby": "said" },
    h("h2", { id: "said" }, "That did not work"), trouble(error),
    h("form", { method: "dialog" }, h("button", {}, "Close")));
  show(dialog);
}

export function confirmed(question, yes, { tone = "bad" } = {}) {
  return new Promise((resolve) => {
    const dialog = h("dialog", { "aria-labelledby": "asked" },
      h("h2", { id: "asked" }, question),
      h("form", { method: "dialog", class: "row" }, h("button", { value: "no" }, "Go back"), h("button", { value: "yes", class: tone }, yes)));
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"));
    show(dialog);
  });
}

/** Show a secret, which can't be shown again. */
export function shownOnce(title, why, secret, then = () => {}) {
  const dialog = h("dialog", { "aria-labelledby": "made" },
    h("h2", { id: "made" }, title), h("p", {}, why), copyable(secret),
    h("form", { method: "dialog" }, h("button", { class: "primary" }, "I have it")));
  dialog.addEventListener("close", then);
  show(dialog);
}

export function show(dialog) {
  document.body.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.showModal();
}

/** Text with a button that copies it. Browsers allow this only over https and on localhost; elsewhere the text is selected by hand. */
export function copyable(text) {
  const pre = h("pre", { tabindex: "0" }, text);
  if (!navigator.clipboard) return h("div", {}, pre);
  const copy = h("button", { type: "button", class: "small" }, "Copy");
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    announce("Copied");
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  });
  return h("div", { class: "copyable" }, pre, copy);
}
