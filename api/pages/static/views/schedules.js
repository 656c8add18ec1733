// The list of schedules, a schedule with its fires and their outcomes, and the form of a schedule.

import { change, get, post } from "../api.js";
import { announce, fill, h } from "../dom.js";
import { age, moment, money, words } from "../format.js";
import { newest, poll } from "../live.js";
import { badge, button, confirmed, copyable, empty, facts, field, heading, row, table, trouble } from "../parts.js";

const COLUMNS = ["Schedule", "State", "When", "Next", "Presses", ""];
const RUNS = ["Fire", "Outcome", "Job", "Cause"];

export async function schedules(main, { signal, query, go }) {
  const notice = h("div");
  const place = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  const making = h("div");
  fill(main, heading("Schedules", button("New schedule", async () => fill(making, await form(signal, go)), { tone: "primary" })), notice, making, place, pages);
  await poll(signal, 5, async () => {
    const page = await get("/v1/schedules", { cursor: query.get("cursor"), limit: 50 }, signal);
    fill(notice);
    if (page.items.length === 0) fill(place, empty("No schedules yet.", h("p", {}, "This command makes a nightly job:"), copyable('nightpress schedule add nightly --cron "0 2 * * *" --timezone Europe/Berlin --model my-model --recipe int8-encoder')));
    else fill(place, table("Schedules", COLUMNS, page.items.map((schedule) => draw(schedule, go))));
    fill(pages, page.next_cursor ? h("a", { href: `#/schedules?cursor=${encodeURIComponent(page.next_cursor)}` }, "More") : null);
  }, (error) => fill(notice, trouble(error)));
}

function draw(schedule, go) {
  return row(COLUMNS, [
    h("a", { href: `#/schedules/${schedule.id}` }, schedule.name),
    badge(schedule.suspended ? "suspended" : "active"),
    h("span", {}, h("code", {}, schedule.cron), h("small", {}, schedule.timezone)),
    next(schedule),
    pressed(schedule),
    actions(schedule, () => go("#/schedules")),
  ]);
}

function next(schedule) {
  const [first] = schedule.upcoming;
  return first ? h("time", { datetime: first, title: moment(first) }, age(first)) : "–";
}

function pressed({ job, study }) {
  if (study) return `${study.model} · least ${words(study.minimize ?? "size")} with ${Object.entries(study.gates).map(([name, bound]) => `${words(name)} ${bound}`).join(", ")}`;
  return `${job.model} · ${typeof job.recipe === "string" ? job.recipe : job.recipe.name}`;
}

function actions(schedule, done) {
  const path = `/v1/schedules/${schedule.id}`;
  return h("div", { class: "row" },
    button("Run now", async () => {
      await post(`${path}/trigger`);
      announce(`${schedule.name} fires now`);
      await done();
    }, { tone: "small", label: `Run ${schedule.name} now` }),
    schedule.suspended
      ? button("Resume", async () => { await post(`${path}/resume`); await done(); }, { tone: "small", label: `Resume ${schedule.name}` })
      : button("Suspend", async () => { await post(`${path}/suspend`); await done(); }, { tone: "small", label: `Suspend ${schedule.name}` }));
}

export async function schedule(main, { signal, go }, id) {
  const path = `/v1/schedules/${encodeURIComponent(id)}`;
  const head = h("div");
  const notice = h("div");
  const editing = h("div");
  const runs = h("div");
  fill(main, head, notice, editing, h("section", { "aria-labelledby": "runs" }, h("h2", { id: "runs" }, "Fires"), runs));
  const show = newest(drawHead);
  await poll(signal, 4, refresh, (error) => fill(notice, trouble(error)));

  async function refresh() {
    const [schedule, page] = await Promise.all([get(path, {}, signal), get(`${path}/runs`, { limit: 50 }, signal)]);
    fill(notice);
    show(schedule);
    fill(runs, page.items.length === 0 ? empty("It has not fired yet.") : table("Fires, newest first", RUNS, page.items.map((run) => row(RUNS, [
      h("time", { datetime: run.scheduled_for }, moment(run.scheduled_for)),
      h("span", {}, badge(run.state), run.reason ? ` ${words(run.reason)}` : "", run.error ? h("small", {}, run.error.message) : null),
      run.job_id ? h("span", {}, h("a", { href: `#/jobs/${run.job_id}` }, run.job_id), " ", run.job_state ? badge(run.job_verdict ?? run.job_state) : null) : run.study_id ? h("span", {}, h("a", { href: `#/studies/${run.study_id}` }, run.study_id), " ", run.study_state ? badge(run.study_verdict ?? run.study_state) : null) : "–", run.cause]))));
  }

  /** Its buttons name the version that they change. */
  function drawHead(schedule) {
    document.title = `${schedule.name} · Nightpress`;
    fill(head, h("p", { class: "crumbs" }, h("a", { href: "#/schedules" }, "Schedules"), " / ", h("code", {}, schedule.id)),
      heading(schedule.name, actions(schedule, refresh),
        button("Edit", async () => fill(editing, await form(signal, go, schedule)), { tone: "small" }),
        button("Delete", async () => {
          if (!(await confirmed(`Delete the schedule “${schedule.name}”?`, "Delete it"))) return;
          await change("DELETE", path, undefined, schedule.version);
          go("#/schedules");
        }, { tone: "small bad" })),
      facts([
        ["State", badge(schedule.suspended ? "suspended" : "active")],
        ["When", h("span", {}, h("code", {}, schedule.cron), " ", schedule.timezone)],
        ["Next", schedule.upcoming.length ? schedule.upcoming.slice(0, 3).map((at) => h("div", {}, h("time", { datetime: at }, `${moment(at)} (${age(at)})`))) : null],
        ["Presses", pressed(schedule)],
        ["Cost", money(schedule.cost)],
        ["Fetched from", schedule.source ? h("code", {}, schedule.source) : null],
        ["If the last job still runs", words(schedule.overlap)],
        ["Missed fires", schedule.catch_up === "none" ? "left out" : schedule.catch_up === "latest" ? "the latest is made up for" : "all are made up for"],
        ["Only if something changed", schedule.only_if_changed ? "yes" : "no"],
      ]));
  }
}

/** The form of a new schedule, or of an existing one: `If-Match` then refuses an edit of an older version. */
async function form(signal, go, existing = null) {
  const [recipes, models] = await Promise.all([get("/v1/recipes", {}, signal), get("/v1/models", { limit: 200 }, signal)]);
  const job = existing?.job ?? {};
  const own = typeof job.recipe === "object";
  const study = existing?.study ?? null;
  const name = h("input", { required: true, pattern: "[a-z0-9][a-z0-9._\\-]{0,63}", value: existing?.name ?? "nightly" });
  const cron = h("input", { required: true, value: existing?.cron ?? "0 2 * * *" });
  const zone = h("input", { required: true, value: existing?.timezone ?? Intl.DateTimeFormat().resolvedOptions().timeZone });
  const names = [...new Set([...(job.model ? [job.model] : []), ...models.items.map((item) => item.name)])];
  const model = h("input", { required: true, maxlength: 128, list: "known-models", value: job.model ?? names[0] ?? "" });
  const source = h("input", { maxlength: 1024, placeholder: "s3://models/released/minilm", value: existing?.source ?? "" });
  const recipe = h("select", {}, own ? h("option", { value: "", selected: true }, `${job.recipe.name} (as it is)`) : null, recipes.items.map((item) => h("option", { value: item.name, selected: item.name === job.recipe }, item.name)));
  const choice = (options, chosen) => h("select", {}, options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
  const overlap = choice([["skip", "skip this fire"], ["queue", "wait for it"], ["replace", "cancel it"]], existing?.overlap ?? "skip");
  const catchUp = choice([["none", "leave them out"], ["latest", "make up for the latest"], ["all", "make up for all"]], existing?.catch_up ?? "latest");
  const onlyIfChanged = h("input", { type: "checkbox", id: "only-if-changed", checked: existing?.only_if_changed ?? true });
  const place = h("div");
  const element = h("form", { class: "card" }, h("h2", {}, existing ? `Edit ${existing.name}` : "New schedule"), place,
    h("div", { class: "pair" },
      h("div", {}, field("Name", name), field("When (cron)", cron, "Minute, hour, day, month, weekday."), field("Time zone", zone, "As in Europe/Berlin."),
        field("If the last job still runs", overlap), field("Missed fires", catchUp)),
      h("div", {}, field("Model", model, "Each fire takes the newest model of this name."), h("datalist", { id: "known-models" }, names.map((known) => h("option", { value: known }))),
        field("Fetched from", source, "s3://, hf:// or a folder of the server. Each fire looks there first and fetches what is new under the model's name. Empty: only the models of the service."),
        h("p", { class: "check" }, onlyIfChanged, h("label", { for: "only-if-changed" }, "Only if something changed")), study ? h("p", { class: "quiet" }, "Each fire begins a study. Its goal and gates are changed on the command line or over the API.") : field("Recipe", recipe))),
    h("div", { class: "row" }, h("button", { class: "primary" }, existing ? "Save" : "Create"), h("button", { type: "button", onclick: () => element.remove() }, "Cancel")));
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    const wanted = { name: name.value.trim(), cron: cron.value.trim(), timezone: zone.value.trim(), overlap: overlap.value, catch_up: catchUp.value, only_if_changed: onlyIfChanged.checked, source: source.value.trim() || null, ...(study ? { study: { ...study, model: model.value.trim() } } : { job: { ...job, model: model.value.trim(), recipe: recipe.value || job.recipe } }) };
    try {
      const saved = existing
        ? await change("PATCH", `/v1/schedules/${existing.id}`, wanted, existing.version)
        : await post("/v1/schedules", wanted);
      element.remove();
      go(`#/schedules/${saved.id}`);
    } catch (error) {
      fill(place, trouble(error));
    }
  });
  return element;
}
