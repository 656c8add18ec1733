// Several jobs side by side: which artifacts are smaller, better and faster, and which are beaten in everything.

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
    fill(main, heading("Compare"), empty("Nothing to compare yet.", h("p", {}, "Choose finished jobs below, or in the list of jobs.")), picker);
    return;
  }
  const found = await Promise.allSettled(ids.map(async (id) => ({ job: id, report: (await get(`/v1/jobs/${encodeURIComponent(id)}/report`, {}, signal)).report })));
  const reports = found.filter((result) => result.status === "fulfilled").map((result) => result.value);
  const missing = found.flatMap((result, at) => (result.status === "rejected" ? [trouble(new Error(`${ids[at]}: ${result.reason.message}`))] : []));
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
    reports.length > 1 && new Set(reports.map((entry) => entry.report.model.digest)).size > 1 ? h("p", { class: "notice" }, "These jobs pressed different models. Their quality figures are perhaps not comparable.") : null,
    h("p", { class: "quiet" }, "Grey: another artifact is at least as good in size, quality and latency, and better in at least one of them."),
    h("div", { class: "pair" },
      measure ? scatter(`Size against ${words(measure)}`, "size, MB", words(measure), drawn(all, (point) => point.size / 1e6, (point) => point.quality)) : null,
      all.every((point) => point.latency !== null) ? scatter("Size against latency", "size, MB", "latency, ms", drawn(all, (point) => point.size / 1e6, (point) => point.latency)) : null),
    table("Artifacts and their sources", columns, sorted.map((point) => row(columns, [
      h("span", {}, point.label, point.source ? null : h("small", { class: "quiet" }, " ", h("a", { href: `#/jobs/${point.job}` }, point.job))),
      bytes(point.size), ...(measure ? [figure(point.quality)] : []), point.latency === null ? "–" : `${figure(point.latency)} ms`, point.dominated ? "beaten" : "not beaten",
    ], { class: point.dominated ? "dominated" : "" }))),
    picker);
}

function drawn(all, x, y) {
  return all.map((point) => ({ label: point.label, source: point.source, dominated: point.dominated, x: x(point), y: y(point) })).filter((point) => point.y !== null);
}

async function choose(ids, signal, go) {
  const page = await get("/v1/jobs", { state: "succeeded", limit: 50 }, signal);
  const others = page.items.filter((job) => !ids.includes(job.id));
  if (others.length === 0) return null;
  const select = h("select", { "aria-label": "Add a job" }, h("option", { value: "" }, "Add a job…"), others.map((job) => h("option", { value: job.id }, `${job.name || job.recipe.name} · ${job.model_name}`)));
  select.addEventListener("change", () => go(`#/compare?${new URLSearchParams([...ids, select.value].map((id) => ["job", id]))}`));
  return h("p", {}, select);
}
