// Models that people brought.

import { change, get, post } from "../api.js";
import { fill, h } from "../dom.js";
import { age, bytes, count } from "../format.js";
import { poll } from "../live.js";
import { badge, button, confirmed, copyable, empty, field, heading, row, table, trouble } from "../parts.js";

const COLUMNS = ["Model", "State", "Kind", "Parameters", "Size", "Brought", ""];

export async function models(main, { signal, query, go }) {
  const notice = h("div");
  const place = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  fill(main, heading("Models"), notice, place, pages, bring(go));
  await poll(signal, 4, async () => {
    const page = await get("/v1/models", { cursor: query.get("cursor"), limit: 50 }, signal);
    fill(notice);
    if (page.items.length === 0) fill(place, empty("No models yet.", h("p", {}, "Send one from where it lies:"), copyable("nightpress submit ./my-model --recipe int8-encoder --wait")));
    else fill(place, table("Models, newest first", COLUMNS, page.items.map((one) => draw(one, go))));
    fill(pages, page.next_cursor ? h("a", { href: `#/models?cursor=${encodeURIComponent(page.next_cursor)}` }, "Older") : null);
  }, (error) => fill(notice, trouble(error)));
}

function draw(model, go) {
  return row(COLUMNS, [
    h("span", {}, model.name, h("small", { class: "quiet" }, ` ${model.id}`)),
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

/** From a folder on the server, which the operator allowed. Folders of one's own go through the command line, which hashes and resumes. */
function bring(go) {
  const name = h("input", { required: true, pattern: "[a-z0-9][a-z0-9._-]{0,63}", placeholder: "all-minilm-l6-v2" });
  const path = h("input", { required: true, placeholder: "/srv/models/all-minilm-l6-v2" });
  const place = h("div");
  const form = h("form", { class: "card narrow" },
    h("h2", {}, "Bring a model from the server"), place,
    field("Name", name, "Lower-case letters, digits, dots and dashes."),
    field("Folder, `s3://` or `hf://` address", path, "Folders, prefixes and organisations that the operator allowed. A folder of your own: nightpress submit ./folder."),
    h("button", {}, "Bring it"));
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
