// Several jobs side by side: who is smaller, better and faster, and who is beaten in all three.

import { get } from "../api.js";
import { scatter } from "../charts.js";
import { points } from "../comparison.js";
import { fill, h } from "../dom.js";
import { bytes, figure, words } from "../format.js";
import { empty, heading, row, table, trouble } from "../parts.js";

export async function compare(main, { signal, query, go }) {
  const ids = query.getAll("job");
  const picker = await choose(ids, signal, go);
  if (ids.length === 0) {
    fill(main, heading("Compare"), empty("Nothing to compare yet.", h("p", {}, "Choose finished jobs below, or tick them in the list of jobs.")), picker);
    return;
  }
  const found = await Promise.allSettled(ids.map(async (id) => ({ job: id, report: (await get(`/v1/jobs/${encodeURIComponent(id)}/report`, {}, signal)).report })));
  const reports = found.filter((one) => one.status === "fulfilled").map((one) => one.value);
  const missing = found.flatMap((one, at) => (one.status === "rejected" ? [trouble(new Error(`${ids[at]}: ${one.reason.message}`))] : []));
  if (reports.length === 0) {
    fill(main, heading("Compare"), missing, picker);
    return;
  }
  const all = points(reports);
  const measure = all[0].measure;
  const columns = ["Artifact", "Size", ...(measure ? [words(measure)] : []), "Latency", "Standing"];
  const sorted = [...all].sort((a, b) => a.dominated - b.dominated || a.size - b.size);
  fill(main,
    heading("Compare"), missing,
    reports.length > 1 && new Set(reports.map((one) => one.report.model.digest)).size > 1 ? h("p", { class: "notice" }, "These jobs pressed different models: their quality figures may not mean the same.") : null,
    h("p", { class: "quiet" }, "Grey: another is at least as good in size, quality and latency, and better in one."),
    h("div", { class: "pair" },
      measure ? scatter(`Size against ${words(measure)}`, "size, MB", words(measure), drawn(all, (one) => one.size / 1e6, (one) => one.quality)) : null,
      all.every((one) => one.latency !== null) ? scatter("Size against latency", "size, MB", "latency, ms", drawn(all, (one) => one.size / 1e6, (one) => one.latency)) : null),
    table("Artifacts and their sources", columns, sorted.map((one) => row(columns, [
      h("span", {}, one.label, one.source ? null : h("small", { class: "quiet" }, " ", h("a", { href: `#/jobs/${one.job}` }, one.job))),
      bytes(one.size), ...(measure ? [figure(one.quality)] : []), one.latency === null ? "–" : `${figure(one.latency)} ms`, one.dominated ? "beaten" : "best in its way",
    ], { class: one.dominated ? "dominated" : "" }))),
    picker);
}

function drawn(all, x, y) {
  return all.map((one) => ({ label: one.label, source: one.source, dominated: one.dominated, x: x(one), y: y(one) })).filter((one) => one.y !== null);
}

async function choose(ids, signal, go) {
  const page = await get("/v1/jobs", { state: "succeeded", limit: 50 }, signal);
  const others = page.items.filter((one) => !ids.includes(one.id));
  if (others.length === 0) return null;
  const select = h("select", { "aria-label": "Add a job" }, h("option", { value: "" }, "Add a job…"), others.map((one) => h("option", { value: one.id }, `${one.name || one.recipe.name} · ${one.model_name}`)));
  select.addEventListener("change", () => go(`#/compare?${new URLSearchParams([...ids, select.value].map((id) => ["job", id]))}`));
  return h("p", {}, select);
}
