// The frame of the page: signing in and out, the navigation, and the view that the address names.

import { forget, get, keep, signedIn, signOut } from "./api.js";
import { announce, fill, h } from "./dom.js";
import { person, provider, reasonOf } from "./signin.js";
import { field, heading, trouble } from "./parts.js";
import { access } from "./views/access.js";
import { compare } from "./views/compare.js";
import { job } from "./views/job.js";
import { jobs } from "./views/jobs.js";
import { model, models } from "./views/models.js";
import { deliveries } from "./views/deliveries.js";
import { fresh } from "./views/new.js";
import { schedule, schedules } from "./views/schedules.js";
import { studies, study } from "./views/studies.js";
import { tenants } from "./views/tenants.js";
import { webhook, webhooks } from "./views/webhooks.js";
import { workers } from "./views/workers.js";

const VIEWS = [
  [/^\/jobs$/, jobs, "Jobs"],
  [/^\/jobs\/new$/, fresh, "New job"],
  [/^\/jobs\/([^/]+)$/, job, "Job"],
  [/^\/compare$/, compare, "Compare"],
  [/^\/models$/, models, "Models"],
  [/^\/models\/([^/]+)$/, model, "Model"],
  [/^\/schedules$/, schedules, "Schedules"],
  [/^\/schedules\/([^/]+)$/, schedule, "Schedule"],
  [/^\/studies$/, studies, "Studies"],
  [/^\/studies\/([^/]+)$/, study, "Study"],
  [/^\/workers$/, workers, "Workers"],
  [/^\/deliveries$/, deliveries, "Deliveries"],
  [/^\/webhooks$/, webhooks, "Webhooks"],
  [/^\/webhooks\/([^/]+)$/, webhook, "Webhook"],
  [/^\/access$/, access, "Keys"],
  [/^\/tenants$/, tenants, "Tenants"],
];
const NAVIGATION = [["#/jobs", "Jobs"], ["#/models", "Models"], ["#/studies", "Studies"], ["#/schedules", "Schedules"], ["#/deliveries", "Deliveries"], ["#/workers", "Workers"], ["#/webhooks", "Webhooks"], ["#/access", "Keys"]];
const THEME = "nightpress.theme";
const main = document.getElementById("main");
let leave = new AbortController();

async function route() {
  leave.abort();
  leave = new AbortController();
  if (!signedIn()) return signIn(reasonOf(location.hash));
  const [path, search] = (location.hash.slice(1) || "/jobs").split("?");
  const found = VIEWS.map(([pattern, view, title]) => [path.match(pattern), view, title]).find(([match]) => match);
  navigation(path);
  if (found === undefined) {
    fill(main, heading("There is no such page"), h("p", {}, h("a", { href: "#/jobs" }, "To the jobs")));
    return undefined;
  }
  const [match, view, title] = found;
  document.title = `${title} · Nightpress`;
  const { signal } = leave;
  try {
    await view(main, { signal, query: new URLSearchParams(search), go }, ...match.slice(1).map(decodeURIComponent));
  } catch (error) {
    if (!signal.aborted) fill(main, heading(title), trouble(error));
  }
  if (!signal.aborted) arrive(title);
  return undefined;
}

/** For screen readers, a new view is a new page: announce its title and focus its heading. */
function arrive(title) {
  announce(title);
  if (document.activeElement === document.body || document.activeElement?.closest("nav")) main.querySelector("h1")?.focus({ preventScroll: true });
}

function go(hash) {
  if (location.hash === hash) route();
  else location.hash = hash;
}

function navigation(path) {
  fill(document.getElementById("nav"), NAVIGATION.map(([href, text]) =>
    h("a", { href, "aria-current": path.startsWith(href.slice(1)) ? "page" : null }, text)));
  fill(document.getElementById("tools"),
    h("a", { href: "/docs" }, "API"),
    themeButton(),
    person(),
    h("button", { type: "button", class: "small", onclick: leaveThePage }, "Sign out"));
}

function themeButton() {
  const dark = () => document.documentElement.dataset.theme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const element = h("button", { type: "button", class: "small" });
  const draw = () => (element.textContent = dark() ? "Light" : "Dark");
  element.addEventListener("click", () => {
    const next = dark() ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    localStorage.setItem(THEME, next);
    draw();
  });
  draw();
  return element;
}

async function leaveThePage() {
  await signOut();
  route();
}

function signIn(fault = null) {
  document.title = "Sign in · Nightpress";
  fill(document.getElementById("nav"));
  fill(document.getElementById("tools"), themeButton());
  const input = h("input", { type: "password", name: "key", autocomplete: "current-password", placeholder: "np_…", required: true, spellcheck: "false" });
  const stay = h("input", { type: "checkbox", id: "stay" });
  const place = h("div");
  const form = h("form", { class: "card narrow" },
    heading("Sign in"),
    place,
    provider(),
    field("API key", input, "`nightpress up` writes a key to its data folder. An operator can make more."),
    h("p", { class: "check" }, stay, h("label", { for: "stay" }, "Stay signed in on this device")),
    h("button", { class: "primary" }, "Sign in"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    keep(input.value.trim(), stay.checked);
    try {
      await get("/v1/me");
    } catch (error) {
      forget();
      fill(place, trouble(error));
      return;
    }
    route();
  });
  fill(main, form);
  if (fault) fill(place, trouble(fault));
  input.focus();
}

/** `nightpress web` opens an address with the key after the #, which browsers don't send to a server. */
function takeKeyFromAddress() {
  const given = location.hash.match(/^#key=(np_[A-Za-z0-9_-]+)$/);
  if (given === null) return;
  keep(given[1], false);
  history.replaceState(null, "", `${location.pathname}#/jobs`);
}

const theme = localStorage.getItem(THEME);
if (theme) document.documentElement.dataset.theme = theme;
takeKeyFromAddress();
window.addEventListener("hashchange", () => {
  takeKeyFromAddress();
  route();
});
window.addEventListener("signed-out", () => {
  leave.abort();
  forget();
  signIn(new Error("The key or session is no longer accepted. Sign in again."));
});
route();
