// The list of models, a model with the results that its name has meant, and the form that adds a model.

import { change, get, post } from "../api.js";
import { fill, h } from "../dom.js";
import { age, bytes, count } from "../format.js";
import { poll } from "../live.js";
import { badge, button, confirmed, copyable, empty, facts, field, heading, row, table, trouble } from "../parts.js";

const PROMOTIONS = ["Job", "Recipe", "Since", "Cause", ""];
const COLUMNS = ["Model", "State", "Kind", "Parameters", "Size", "Added", ""];

export async function models(main, { signal, query, go }) {
  const notice = h("div");
  const place = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  fill(main, heading("Models"), notice, place, pages, bring(go));
  await poll(signal, 4, async () => {
    const page = await get("/v1/models", { cursor: query.get("cursor"), limit: 50 }, signal);
    fill(notice);
    if (page.items.length === 0) fill(place, empty("No models yet.", h("p", {}, "Send a local folder:"), copyable("nightpress submit ./my-model --recipe int8-encoder --wait")));
    else fill(place, table("Models, newest first", COLUMNS, page.items.map((model) => draw(model, go))));
    fill(pages, page.next_cursor ? h("a", { href: `#/models?cursor=${encodeURIComponent(page.next_cursor)}` }, "Older") : null);
  }, (error) => fill(notice, trouble(error)));
}

function draw(model, go) {
  return row(COLUMNS, [
    h("span", {}, h("a", { href: `#/models/${model.id}` }, model.name), h("small", { class: "quiet" }, ` ${model.id}`)),
    h("div", {}, badge(model.state), model.error ? h("small", { class: "quiet" }, model.error.message) : null),
    h("span", {}, model.architecture ?? "–", model.task ? h("small", { class: "quiet" }, ` ${model.task}`) : null),
    count(model.parameters), bytes(model.size), h("time", { datetime: model.created_at }, age(model.created_at)),
    h("div", { class: "row" },
      model.state === "ready" ? h("a", { class: "button small", href: `#/jobs/new?model=${encodeURIComponent(model.id)}`, "aria-label": `Press ${model.name}` }, "Press") : null,
      button("Delete", async () => {
        if (!(await confirmed(`Delete ${model.name}?`, "Delete the model"))) return;
        await change("DELETE", `/v1/models/${model.id}`);
        go("#/models");
      }, { tone: "small", label: `Delete ${model.name}` })),
  ]);
}

/** A model, and the results that its name has meant: deployments follow the first. */
export async function model(main, { signal }, id) {
  const view = await get(`/v1/models/${encodeURIComponent(id)}`, {}, signal);
  const path = `/v1/models/${encodeURIComponent(view.name)}`;
  const pointer = h("div");
  const going = h("div");
  document.title = `${view.name} · Nightpress`;
  fill(main,
    h("p", { class: "crumbs" }, h("a", { href: "#/models" }, "Models"), " / ", h("code", {}, view.id)),
    heading(view.name, view.state === "ready" ? h("a", { class: "button primary", href: `#/jobs/new?model=${encodeURIComponent(view.id)}` }, "Press it") : null),
    facts([
      ["State", badge(view.state)], ["Kind", view.architecture], ["Task", view.task], ["Parameters", count(view.parameters)], ["Size", bytes(view.size)],
      ["Digest", view.digest ? h("code", {}, view.digest) : null], ["Added", age(view.created_at)],
      ["Jobs", h("a", { href: `#/jobs?model=${encodeURIComponent(view.id)}` }, "on this model")],
    ]),
    h("section", { "aria-labelledby": "latest" }, h("h2", { id: "latest" }, "Latest accepted"), pointer),
    h("section", { "aria-labelledby": "going" }, h("h2", { id: "going" }, "Where the latest is delivered to"), going));
  await draw();
  const { destinations } = await get(`${path}/destinations`, {}, signal);
  fill(going, destinations.length ? h("ul", {}, destinations.map((destination) => h("li", {}, h("code", {}, destination)))) : h("p", { class: "quiet" }, "Nowhere by themselves. `nightpress deliveries of-model` sets it."));

  async function draw() {
    const history = await get(`${path}/promotions`, { limit: 50 }, signal);
    if (history.items.length === 0) {
      fill(pointer, empty("Nothing yet.", h("p", {}, "The first accepted result becomes the latest.")));
      return;
    }
    fill(pointer, copyable(`nightpress pull ${view.name} --out pressed`),
      table("Results that the name has meant, newest first", PROMOTIONS, history.items.map((promotion, at) => row(PROMOTIONS, [
        h("a", { href: `#/jobs/${promotion.job_id}` }, promotion.job_id), promotion.recipe,
        h("time", { datetime: promotion.created_at }, age(promotion.created_at)), promotion.cause,
        at === 0 ? badge("accepted") : button("Point here again", async () => {
          await post(`${path}/promotions`, { job_id: promotion.job_id });
          await draw();
        }, { tone: "small", label: `Point ${view.name} at ${promotion.job_id} again` })]))));
  }
}

/** The form that adds a model from an allowed folder of the server or from a source. The command line sends local folders, hashes and resumes. */
function bring(go) {
  const name = h("input", { required: true, pattern: "[a-z0-9][a-z0-9._-]{0,63}", placeholder: "all-minilm-l6-v2" });
  const path = h("input", { required: true, placeholder: "/srv/models/all-minilm-l6-v2" });
  const place = h("div");
  const form = h("form", { class: "card narrow" },
    h("h2", {}, "Add a model from the server or a source"), place,
    field("Name", name, "Lower-case letters, digits, dots and dashes."),
    field("Folder, s3:// or hf:// address", path, "Folders, prefixes and organisations that the operator has allowed. For a local folder: nightpress models add ./folder."),
    h("button", {}, "Add it"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const given = path.value.trim();
      await post("/v1/models", { name: name.value.trim(), ...(given.includes("://") ? { source: given } : { path: given }) });
      go("#/models");
    } catch (error) {
      fill(place, trouble(error));
    }
  });
  return form;
}
