// A job: its progress, events, log and result.

import { download, get, post, stream } from "../api.js";
import { bars, lines } from "../charts.js";
import { changed, interval, latency } from "../comparison.js";
import { announce, fill, h } from "../dom.js";
import { age, bytes, count, duration, figure, moment, money, percent, since, words } from "../format.js";
import { poll } from "../live.js";
import { badge, button, confirmed, copyable, facts, heading, progress, row, table, trouble } from "../parts.js";

const ENDED = new Set(["succeeded", "failed", "cancelled"]);
const SAVINGS = ["Artifact", "Measured", "Source", "Artifact's price", "Saved", "Job pays back after"];
const SLICE_FIGURES = ["perplexity", "masked_accuracy", "accuracy", "choice_accuracy", "entity_f1", "spearman", "ndcg", "kl_divergence", "flips", "right_to_wrong", "top1_agreement", "label_agreement", "kendall_tau", "generation_match", "cosine", "centred_cosine", "mean_error"];
const LINES_KEPT = 2000;

export async function job(main, { signal, go }, id) {
  const path = `/v1/jobs/${encodeURIComponent(id)}`;
  const places = Object.fromEntries(["notice", "head", "facts", "result", "passes"].map((name) => [name, h("div")]));
  const history = h("ol", { class: "timeline" });
  const log = h("pre", { class: "log", tabindex: "0", "aria-label": "Log", role: "log" });
  const follow = h("input", { type: "checkbox", id: "follow", checked: true });
  let current = null;

  const first = await get(path, {}, signal);
  fill(main, places.head, places.notice, places.facts, places.result,
    h("section", { "aria-labelledby": "history" }, h("h2", { id: "history" }, "History"), history),
    h("section", { "aria-labelledby": "passes" }, h("h2", { id: "passes" }, "Recipe"), places.passes),
    h("section", { "aria-labelledby": "log" }, h("h2", { id: "log" }, "Log"), h("p", { class: "check" }, follow, h("label", { for: "follow" }, "Follow")), log));
  draw(first);
  fill(places.passes, recipe(first));

  stream(`${path}/events`, 0, (seq, kind, data) => {
    history.append(h("li", {}, h("time", { datetime: data.at, title: moment(data.at) }, new Date(data.at).toLocaleTimeString()), " ", h("strong", {}, words(kind)), " ", h("span", { class: "quiet" }, told(data.data))));
    if (kind !== "progress" && kind !== "metric") refresh().catch(() => {});
  }, signal);
  stream(`${path}/logs`, 0, (seq, kind, line) => {
    log.append(h("span", { class: line.level === "error" ? "bad" : line.level === "warning" ? "warm" : "" }, `${new Date(line.at).toLocaleTimeString()}  ${line.text}\n`));
    while (log.childElementCount > LINES_KEPT) log.firstElementChild.remove();
    if (follow.checked) log.scrollTop = log.scrollHeight;
  }, signal);
  await poll(signal, 2, refresh, (error) => fill(places.notice, trouble(error)));

  async function refresh() {
    if (current !== null && ENDED.has(current.state)) return;
    draw(await get(path, {}, signal));
    fill(places.notice, current.error ? failed(current.error) : null);
  }

  function draw(now) {
    const before = current;
    current = now;
    if (before !== null && before.state !== now.state) announce(`The job is ${now.state}`);
    if (before === null || JSON.stringify(before) !== JSON.stringify(now)) fill(places.head, head(now, go));
    fill(places.facts, ENDED.has(now.state) || now.state === "queued" ? null : h("div", { class: "now" }, progress(now), h("p", { class: "quiet" }, now.message)), about(now));
    if (now.error) fill(places.notice, failed(now.error));
    if (now.state === "succeeded" && places.result.childElementCount === 0) results(path, now, places.result, signal).catch((error) => fill(places.result, trouble(error)));
  }
}

function failed(error) {
  return h("div", { class: "notice bad" }, h("p", {}, h("strong", {}, error.message), " ", h("code", {}, error.code)), error.hint ? h("p", {}, error.hint) : null);
}

function head(now, go) {
  const title = now.name || `${now.recipe.name} · ${now.model_name}`;
  document.title = `${title} · Nightpress`;
  return [
    h("p", { class: "crumbs" }, h("a", { href: "#/jobs" }, "Jobs"), " / ", h("code", {}, now.id)),
    heading(title,
      ENDED.has(now.state) ? button("Run again", async () => go(`#/jobs/${(await post(`/v1/jobs/${now.id}/retry`)).id}`))
        : button("Cancel", async () => (await confirmed("Cancel this job?", "Cancel the job")) && post(`/v1/jobs/${now.id}/cancel`), { tone: "bad" })),
    h("p", { class: "state" }, badge(now.state), now.verdict ? badge(now.verdict) : null),
  ];
}

function about(now) {
  const end = now.finished_at ? Date.parse(now.finished_at) : Date.now();
  return facts([
    ["Model", h("span", {}, now.model_name, " ", h("code", {}, now.model_id))],
    ["Queue", `${now.queue}${now.priority ? `, priority ${now.priority}` : ""}`],
    ["Why", now.queue_reason || null],
    ["Notice", now.notice],
    ["Submitted", h("time", { datetime: now.created_at }, `${moment(now.created_at)} (${age(now.created_at)})`)],
    ["Starts after", since(now.run_after) < 0 ? moment(now.run_after) : null],
    ["Started", now.started_at ? moment(now.started_at) : null],
    ["Took", now.started_at ? duration((end - Date.parse(now.started_at)) / 1000) : null],
    ["Cost", money(now.cost)],
    ["Attempt", now.attempt ? `${now.attempt}, ${now.failures} of ${now.max_failures} failures` : null],
    ["Worker", now.worker_id ? h("code", {}, now.worker_id) : null],
    ["Trial of", now.study_id ? h("a", { href: `#/studies/${now.study_id}` }, now.study_id) : null],
    ["Retry of", now.retry_of ? h("a", { href: `#/jobs/${now.retry_of}` }, now.retry_of) : null],
    ["Reused from", now.reused_from ? h("a", { href: `#/jobs/${now.reused_from}` }, now.reused_from) : null],
    ["Labels", Object.keys(now.labels).length === 0 ? null : Object.entries(now.labels).map(([name, value]) => h("span", { class: "label" }, `${name}=${value}`))],
  ]);
}

function told(data) {
  const parts = Object.entries(data ?? {}).filter(([, value]) => value !== null && typeof value !== "object").map(([name, value]) => `${words(name)} ${typeof value === "number" ? figure(value) : value}`);
  return parts.join(" · ").slice(0, 300);
}

function recipe(now) {
  return [
    h("ol", { class: "passes" }, now.recipe.passes.map((step) => h("li", {}, h("strong", {}, step.pass), " ", h("span", { class: "quiet" }, Object.entries(step).filter(([name, value]) => name !== "pass" && name !== "ignore" && value !== null).map(([name, value]) => `${words(name)} ${typeof value === "object" ? JSON.stringify(value) : value}`).join(" · "))))),
    h("details", {}, h("summary", {}, "The whole recipe"), copyable(JSON.stringify(now.recipe, null, 2))),
  ];
}

async function results(path, now, place, signal) {
  const [{ report }, artifacts, trackers, cost] = await Promise.all(["report", "artifacts", "trackers", "cost"].map((part) => get(`${path}/${part}`, {}, signal)));
  const subjects = [report.source, ...report.artifacts];
  fill(place,
    h("section", { "aria-labelledby": "result" }, h("h2", { id: "result" }, "Before and after"), gates(report), searches(report), comparison(report, subjects), slices(report),
      h("div", { class: "pair" },
        bars("Size", subjects.map((subject) => ({ label: subject.name, value: subject.size_bytes, text: bytes(subject.size_bytes), tone: subject === report.source ? "pale" : "solid" }))),
        subjects.every((subject) => latency(subject)) ? bars(`Latency, batch ${latency(report.source).batch} × ${latency(report.source).length} tokens`, subjects.map((subject) => ({ label: subject.name, value: latency(subject).p50_ms, text: `${figure(latency(subject).p50_ms)} ms`, tone: subject === report.source ? "pale" : "solid" }))) : null),
      curves(report)),
    savings(cost),
    h("section", { "aria-labelledby": "artifacts" }, h("h2", { id: "artifacts" }, "Artifacts"), copyable(`nightpress pull ${now.id} --out pressed`), artifacts.items.map((item) => artifact(path, item, report))),
    h("p", { class: "row" },
      button("Save the report (HTML)", () => download(`${path}/report.html`, `${now.id}.html`)),
      button("Save the model card", () => download(`${path}/report.md`, `${now.id}.md`)),
      h("a", { class: "button", href: `#/compare?job=${now.id}` }, "Compare with other jobs"),
      now.verdict === "accepted" ? h("a", { class: "button", href: `#/deliveries?job=${now.id}` }, "Deliveries") : null,
      trackers.items.filter((run) => /^https?:/.test(run.page ?? "")).map((run) => h("a", { class: "button", href: run.page, rel: "noreferrer" }, `Show in ${run.tracker === "mlflow" ? "MLflow" : run.tracker}`))));
}

/** What a million tokens cost with the source and with each artifact. Nothing where the operator has set no prices. */
function savings(cost) {
  if (cost.savings.length === 0) return null;
  const price = (amount) => money({ amount, currency: cost.currency });
  return h("section", { "aria-labelledby": "savings" }, h("h2", { id: "savings" }, "A million tokens"),
    table("What a million tokens cost", SAVINGS, cost.savings.map((saving) => row(SAVINGS, [
      saving.artifact, h("span", {}, saving.what, h("small", { class: "quiet" }, ` ${saving.shape}`)), price(saving.source_per_million), price(saving.per_million),
      saving.saved_per_million >= 0 ? price(saving.saved_per_million) : `−${price(-saving.saved_per_million)}`,
      saving.pays_back_after === null ? "never" : `${Math.ceil(saving.pays_back_after).toLocaleString()} tokens`,
    ]))));
}

// How many times as fast as the source. Reports of earlier versions have only medians.
function times(found, base) {
  if (!found.speedup) return `${(base.p50_ms / found.p50_ms).toFixed(2)}×`;
  const { value, low, high, told_apart } = found.speedup;
  return `${value.toFixed(2)}× [${low.toFixed(2)}, ${high.toFixed(2)}]${told_apart ? "" : ", not told apart"}`;
}

function gates(report) {
  if (report.gates.length === 0) return h("p", { class: "quiet" }, "The recipe has no gates: every verified result is accepted.");
  return h("ul", { class: "gates" }, report.gates.map((gate) => h("li", { class: gate.passed ? "good" : "bad" },
    h("strong", {}, gate.passed ? "met" : "missed"), " ", h("code", {}, gate.gate), " ", h("span", { class: "quiet" }, `${gate.artifact}: ${gate.explanation}`))));
}

// What passes with `within` tried, and what they chose.
function searches(report) {
  const columns = ["Tried", "Weights", "Gate", "Figure"];
  return report.passes.filter((step) => step.within).map(({ name, within }) => h("details", {},
    h("summary", {}, `${name} within ${within.gate}: ${within.chosen}`),
    table(`What ${name} tried`, columns, within.tried.map((tried) => row(columns, [tried.what, bytes(tried.size_bytes), tried.passed ? "kept" : tried.unsure ? "missed by its interval" : "missed", tried.explanation]))),
    within.beyond ? h("p", { class: "quiet" }, `On the other side of the gate: ${within.beyond.what}, ${within.beyond.explanation}.`) : null));
}

function comparison(report, subjects) {
  const measures = [...new Set(subjects.flatMap((subject) => subject.measurements.map((measure) => measure.name)))];
  const shapes = [...new Set(subjects.flatMap((subject) => subject.timings.map((timing) => `${timing.batch} × ${timing.length}`)))];
  const columns = ["Measure", ...subjects.map((subject) => subject.name)];
  const source = report.source;
  const rows = [
    row(columns, ["size", ...subjects.map((subject) => h("span", {}, bytes(subject.size_bytes), subject === source ? null : h("small", {}, percent(subject.size_bytes / source.size_bytes))))]),
    ...measures.map((name) => row(columns, [words(name), ...subjects.map((subject) => {
      const found = subject.measurements.find((measure) => measure.name === name);
      return found ? h("span", {}, interval(found), h("small", {}, changed(found))) : "–";
    })])),
    ...shapes.map((shape) => row(columns, [`latency ${shape}`, ...subjects.map((subject) => {
      const found = subject.timings.find((timing) => `${timing.batch} × ${timing.length}` === shape);
      const base = source.timings.find((timing) => `${timing.batch} × ${timing.length}` === shape);
      return found ? h("span", {}, `${figure(found.p50_ms)} ms`, h("small", {}, subject === source || !base ? `p95 ${figure(found.p95_ms)} ms` : `${times(found, base)} · p95 ${figure(found.p95_ms)} ms`)) : "–";
    })])),
    row(columns, ["peak memory", ...subjects.map((subject) => bytes(subject.peak_memory_bytes))]),
    row(columns, ["parameters", ...subjects.map((subject) => count(subject.parameters))]),
  ];
  const notes = subjects.flatMap((subject) => subject.notes.map((note) => h("li", {}, `${subject.name}: ${note}`)));
  return [table("The source and its artifacts", columns, rows), notes.length ? h("ul", { class: "quiet" }, notes) : null];
}

// The parts of the data that its column `slice` names. The report has the farthest from the source first.
function slices(report) {
  return report.artifacts.filter((subject) => subject.slices?.length).map((subject) => {
    const found = (part, name) => part.measurements.find((measure) => measure.name === name && !measure.of);
    const names = SLICE_FIGURES.filter((name) => subject.slices.some((part) => found(part, name))).slice(0, 5);
    const columns = ["Slice", "Examples", ...names.map(words)];
    return h("details", { open: true }, h("summary", {}, `${subject.name} by slice, the worst first`),
      table(`${subject.name} by slice`, columns, subject.slices.map((part) => row(columns, [
        h("span", {}, part.name, h("small", {}, part.data)), count(part.examples),
        ...names.map((name) => {
          const measure = found(part, name);
          return measure ? h("span", {}, interval(measure), h("small", {}, changed(measure))) : "–";
        })]))));
  });
}

function curves(report) {
  return report.passes.flatMap((step) => {
    const groups = Map.groupBy ? Map.groupBy(step.series ?? [], (series) => series.x_label) : new Map([["step", step.series ?? []]]);
    return [...groups].map(([label, series]) => (series.length ? lines(`${step.name}: ${series.map((curve) => curve.name).join(", ")}`, label, series) : null));
  });
}

function artifact(path, item, report) {
  const subject = report.artifacts.find((found) => found.format === item.format || found.name === item.format);
  const check = subject?.verification;
  return h("article", { class: "card" },
    h("h3", {}, item.format, " ", h("small", { class: "quiet" }, bytes(item.size))),
    check ? h("p", {}, badge(check.passed ? "verified" : "failed"), ` Loaded by ${check.consumer} in a fresh process: ${check.measure} ${figure(check.value)} (bound ${figure(check.bound)}).`) : null,
    check?.load_snippet ? copyable(check.load_snippet) : null,
    item.signed ? h("p", {}, button("Save the signed statement", () => download(`${path}/artifacts/${encodeURIComponent(item.format)}/attestation`, "nightpress.sigstore.json"), { tone: "small" })) : null,
    h("details", {}, h("summary", {}, `${item.files.length} files`),
      h("ul", { class: "files" }, item.files.map((file) => h("li", {}, button(file.path, () => download(item.download_url + file.path.split("/").map(encodeURIComponent).join("/"), file.path.split("/").at(-1)), { tone: "link", label: `Download ${file.path}` }), " ", h("small", { class: "quiet" }, bytes(file.size), " ", h("code", { title: file.sha256 }, file.sha256.slice(0, 12))))))));
}
