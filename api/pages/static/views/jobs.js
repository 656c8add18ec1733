// The list of jobs, newest first, with their progress.

import { get, post } from "../api.js";
import { fill, h, keyed } from "../dom.js";
import { age, duration } from "../format.js";
import { poll } from "../live.js";
import { badge, button, confirmed, empty, heading, progress, row, table, trouble } from "../parts.js";

const STATES = ["queued", "running", "cancelling", "succeeded", "failed", "cancelled"];
const COLUMNS = ["Job", "State", "Recipe", "Model", "Age", "Took", ""];
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

export async function jobs(main, { signal, query, go }) {
  const picked = new Set();
  const wanted = { state: query.getAll("state"), label: query.getAll("label"), model: query.get("model") || "", cursor: query.get("cursor") };
  const filtered = wanted.state.length || wanted.label.length || wanted.model;
  const body = h("tbody");
  const place = h("div");
  const notice = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  const comparing = h("a", { class: "button", hidden: true }, "Compare");

  fill(main,
    heading("Jobs", comparing, h("a", { class: "button primary", href: "#/jobs/new" }, "New job")),
    filters(wanted, go), notice, place, pages);

  function pick(job, on) {
    if (on) picked.add(job.id);
    else picked.delete(job.id);
    comparing.hidden = picked.size < 1;
    comparing.textContent = `Compare ${picked.size}`;
    comparing.href = `#/compare?${new URLSearchParams([...picked].map((id) => ["job", id]))}`;
  }

  let listed = null;
  await poll(signal, 2, async () => {
    const page = await get("/v1/jobs", { ...wanted, limit: 50 }, signal);
    fill(notice);
    if (page.items.length === 0) {
      listed = null;
      fill(place, filtered ? empty("No job matches.", h("p", {}, h("a", { href: "#/jobs" }, "Show all jobs")))
        : empty("No jobs yet.", h("p", {}, "Add a model and choose a recipe: ", h("a", { href: "#/jobs/new" }, "submit the first job"), ", or run ", h("code", {}, "nightpress demo"), ".")));
    } else {
      if (listed === null) {
        listed = table("Jobs, newest first", COLUMNS, [], body);
        fill(place, listed);
      }
      // Ages are part of the items, so that they are redrawn when nothing else has changed.
      keyed(body, page.items.map((job) => ({ ...job, aged: age(job.created_at), ran: ran(job) })), (job) => job.id, (job) => draw(job, picked, pick, refresh));
    }
    turnPages(pages, page, wanted);
  }, (error) => fill(notice, trouble(error)));

  async function refresh() {
    const page = await get("/v1/jobs", { ...wanted, limit: 50 }, signal);
    keyed(body, page.items.map((job) => ({ ...job, aged: age(job.created_at), ran: ran(job) })), (job) => job.id, (job) => draw(job, picked, pick, refresh));
  }
}

function ran(job) {
  if (!job.started_at) return "";
  const end = job.finished_at ? Date.parse(job.finished_at) : Date.now();
  return duration((end - Date.parse(job.started_at)) / 1000);
}

function draw(job, picked, pick, refresh) {
  const title = job.name || `${job.recipe.name} · ${job.model_name}`;
  const mark = h("input", { type: "checkbox", checked: picked.has(job.id), "aria-label": `Compare ${title}`, "data-focus": "pick", onchange: (event) => pick(job, event.target.checked) });
  const state = h("div", { class: "state" }, badge(job.state), job.verdict ? badge(job.verdict) : null,
    ENDED.has(job.state) ? null : job.state === "queued" ? null : progress(job),
    job.error ? h("small", { class: "quiet" }, job.error.message) : null);
  return row(COLUMNS, [
    h("div", {}, job.state === "succeeded" ? mark : null, " ", h("a", { href: `#/jobs/${job.id}`, "data-focus": "open" }, title), labels(job)),
    state,
    h("span", {}, job.recipe.name),
    h("span", {}, job.model_name),
    h("time", { datetime: job.created_at }, job.aged),
    job.ran,
    ENDED.has(job.state) ? "" : button("Cancel", async () => {
      if (!(await confirmed(`Cancel “${title}”?`, "Cancel the job"))) return;
      await post(`/v1/jobs/${job.id}/cancel`);
      await refresh();
    }, { tone: "small", label: `Cancel ${title}`, focus: "cancel" }),
  ]);
}

function labels(job) {
  const found = Object.entries(job.labels);
  return found.length ? h("div", { class: "labels" }, found.map(([name, value]) =>
    h("a", { class: "label", href: `#/jobs?${new URLSearchParams({ label: `${name}=${value}` })}` }, `${name}=${value}`))) : null;
}

function filters(wanted, go) {
  const apply = (changes) => {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries({ ...wanted, cursor: null, ...changes })) for (const item of [value].flat()) if (item) query.append(name, item);
    go(`#/jobs${query.size ? `?${query}` : ""}`);
  };
  const model = h("input", { type: "search", value: wanted.model, placeholder: "model", "aria-label": "Only jobs on this model", onchange: (event) => apply({ model: event.target.value.trim() }) });
  const label = h("input", { type: "search", value: wanted.label[0] || "", placeholder: "label=value", "aria-label": "Only jobs with this label", onchange: (event) => apply({ label: event.target.value.trim() }) });
  return h("div", { class: "filters", role: "group", "aria-label": "Filter" },
    STATES.map((state) => {
      const on = wanted.state.includes(state);
      return h("button", { type: "button", class: "chip", "aria-pressed": String(on), onclick: () => apply({ state: on ? wanted.state.filter((other) => other !== state) : [...wanted.state, state] }) }, state);
    }),
    model, label);
}

function turnPages(pages, page, wanted) {
  const search = (cursor) => {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries({ ...wanted, cursor })) for (const item of [value].flat()) if (item) query.append(name, item);
    return `#/jobs?${query}`;
  };
  fill(pages,
    wanted.cursor ? h("a", { href: search(null) }, "Newest") : null,
    page.next_cursor ? h("a", { href: search(page.next_cursor) }, "Older") : null);
}

