// The list of studies, and a study: the front while it grows, its trials and why each ended, and its report.

import { get, post } from "../api.js";
import { bars, scatter } from "../charts.js";
import { announce, fill, h, keyed } from "../dom.js";
import { age, duration, moment, money, percent, words } from "../format.js";
import { poll } from "../live.js";
import { badge, button, confirmed, copyable, empty, facts, heading, row, table, trouble } from "../parts.js";

const COLUMNS = ["Study", "State", "Wanted", "Trials", "Best", "Begun"];
const TRIALS = ["Trial", "State", "Goal", "Margin", "Recipe", "Time"];
const FRONT = ["Trial", "Goal", "Gates", "Recipe"];
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

export async function studies(main, { signal, query }) {
  const notice = h("div");
  const place = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  fill(main, heading("Studies"), notice, place, pages);
  await poll(signal, 5, async () => {
    const page = await get("/v1/studies", { cursor: query.get("cursor"), limit: 50 }, signal);
    fill(notice);
    if (page.items.length === 0) fill(place, empty("No studies yet.", h("p", {}, "This command finds the smallest form of a model that keeps a gate:"), copyable("nightpress search my-model --minimize size --gate 'perplexity <= +1%'")));
    else fill(place, table("Studies", COLUMNS, page.items.map((study) => row(COLUMNS, [
      h("a", { href: `#/studies/${study.id}` }, study.name || study.id), badge(study.verdict ?? study.state), h("span", {}, wanted(study), h("small", {}, study.model_name)),
      `${ended(study)} of ${study.trials}`, study.best ? percent(study.best.goal, 1) : "–", h("time", { datetime: study.created_at, title: moment(study.created_at) }, age(study.created_at))]))));
    fill(pages, page.next_cursor ? h("a", { href: `#/studies?cursor=${encodeURIComponent(page.next_cursor)}` }, "More") : null);
  }, (error) => fill(notice, trouble(error)));
}

export async function study(main, { signal }, id) {
  const path = `/v1/studies/${encodeURIComponent(id)}`;
  const places = Object.fromEntries(["head", "notice", "report", "picture"].map((name) => [name, h("div")]));
  const body = h("tbody");
  fill(main, places.head, places.notice, places.report, h("section", { "aria-labelledby": "front" }, h("h2", { id: "front" }, "Trials"), places.picture, table("Trials, in the order in which they were proposed", TRIALS, [], body)));
  let before = null;
  await poll(signal, 4, async () => {
    if (before !== null && ENDED.has(before.state)) return;
    const [now, trials] = [await get(path, {}, signal), await all(`${path}/trials`, signal)];
    if (before !== null && before.state !== now.state) announce(`The study is ${now.state}`);
    if (JSON.stringify(now) !== JSON.stringify(before)) fill(places.head, head(now, path), about(now));
    fill(places.notice, now.error ? h("div", { class: "notice bad" }, h("p", {}, h("strong", {}, now.error.message)), now.error.hint ? h("p", {}, now.error.hint) : null) : null);
    fill(places.picture, picture(now, trials));
    keyed(body, trials, (trial) => trial.number, drawTrial);
    if (now.state === "succeeded") fill(places.report, report(now, await get(`${path}/report`, {}, signal)));
    before = now;
  }, (error) => fill(places.notice, trouble(error)));
}

async function all(path, signal) {
  const found = [];
  let cursor = null;
  do {
    const page = await get(path, { cursor, limit: 200 }, signal);
    found.push(...page.items);
    cursor = page.next_cursor;
  } while (cursor !== null);
  return found;
}

function head(now, path) {
  document.title = `${now.name || "Study"} · Nightpress`;
  return [
    h("p", { class: "crumbs" }, h("a", { href: "#/studies" }, "Studies"), " / ", h("code", {}, now.id)),
    heading(now.name || `${wanted(now)} of ${now.model_name}`,
      ENDED.has(now.state) ? null : button("Cancel", async () => (await confirmed("Cancel this study and its trials?", "Cancel the study")) && post(`${path}/cancel`), { tone: "bad" })),
    h("p", { class: "state" }, badge(now.state), now.verdict ? badge(now.verdict) : null),
  ];
}

function about(now) {
  return facts([
    ["Model", h("span", {}, now.model_name, " ", h("code", {}, now.model_id))],
    ["Wanted", wanted(now)],
    ["Trials", `${ended(now)} of ${now.trials} ended, ${now.counts.open ?? 0} open: ${Object.entries(now.counts).filter(([state]) => state !== "open").map(([state, number]) => `${number} ${state}`).join(", ") || "none yet"}`],
    ["Best so far", now.best ? h("span", {}, `${percent(now.best.goal, 1)} of the source's ${now.minimize}, trial ${now.best.number}`) : null],
    ["Search ended by", now.reason],
    ["Ends at the latest", ENDED.has(now.state) ? null : moment(now.deadline_at)],
    ["Cost", money(now.cost)],
    ["Took", [now.cpu_seconds ? `${duration(now.cpu_seconds)} of CPU workers` : null, now.gpu_seconds ? `${duration(now.gpu_seconds)} of GPU workers` : null].filter(Boolean).join(", ")],
    ["Begun", h("time", { datetime: now.created_at }, `${moment(now.created_at)} (${age(now.created_at)})`)],
  ]);
}

/** The trials by goal and margin. The front is drawn as a line; trials above 0 miss a gate. */
function picture(now, trials) {
  const measured = trials.filter((trial) => trial.role === "search" && trial.goal !== null && trial.margin !== null);
  if (measured.length === 0) return empty("No trial has a result yet.");
  const front = [];
  for (const trial of measured.filter((each) => each.state === "kept").sort((a, b) => a.goal - b.goal || a.margin - b.margin)) {
    if (front.length === 0 || trial.margin < front.at(-1).margin) front.push(trial);
  }
  const point = (trial) => ({ x: 100 * trial.goal, y: Math.min(100 * trial.margin, 100), label: front.includes(trial) ? String(trial.number) : "", says: `Trial ${trial.number}`, source: trial.state !== "kept", dominated: trial.state !== "kept" });
  return scatter(`${front.length} of ${measured.length} measured trials are on the front`, `${words(now.minimize)}, % of the source`, "misses by %; at most 0: keeps the gates", measured.map(point), { line: front.map(point), rule: 0 });
}

function drawTrial(trial) {
  return row(TRIALS, [
    h("span", {}, trial.job_id ? h("a", { href: `#/jobs/${trial.job_id}` }, String(trial.number)) : String(trial.number), trial.role === "judge" ? h("small", {}, `last measurement of ${trial.judges}`) : null),
    h("span", {}, badge(trial.state), trial.reason ? h("small", {}, trial.reason) : null),
    trial.goal === null ? "–" : percent(trial.goal, 1),
    trial.margin === null ? "–" : `${trial.margin > 0 ? "+" : ""}${percent(trial.margin, 2)}`,
    recipe(trial.recipe),
    trial.ended_at ? duration(trial.cpu_seconds + trial.gpu_seconds) : "–",
  ]);
}

function report(now, found) {
  const winner = found.winner;
  return h("section", { "aria-labelledby": "found" }, h("h2", { id: "found" }, "What was found"),
    winner === null ? h("div", { class: "notice" }, h("p", {}, "No recipe kept every gate on data that chose nothing."))
      : [h("p", {}, `Trial ${winner.trial} has ${percent(winner.goal, 1)} of the source's ${now.minimize}: `, h("strong", {}, recipe(winner.recipe))),
        found.chosen_again ? h("p", { class: "quiet" }, "The search's first choice missed a gate on the data that judges; this is the next.") : null,
        copyable(`nightpress pull ${winner.job_id}`)],
    found.runner_up ? h("p", {}, `On the other side of the gate: trial ${found.runner_up.trial} misses ${found.runner_up.misses.map((gate) => `${gate.gate} by ${percent(gate.miss, 2)}`).join(", ")}, and would save another ${percent(found.runner_up.gain, 1)}.`) : null,
    found.front.length === 0 ? null : table("Measured again on data that chose nothing", FRONT, found.front.map((entry) => row(FRONT, [
      entry.job_id ? h("a", { href: `#/jobs/${entry.job_id}` }, String(entry.trial)) : String(entry.trial),
      h("span", {}, percent(entry.goal, 1), entry.goal_low === null ? null : h("small", {}, `${percent(entry.goal_low, 1)} to ${percent(entry.goal_high, 1)}`)),
      h("span", {}, badge(entry.kept ? "accepted" : "rejected"), entry.gates.map((gate) => h("small", {}, `${gate.gate}: ${gate.explanation}`))), recipe(entry.recipe)]))),
    found.sensitivity.length === 0 ? null : bars(`What mattered for the ${now.minimize}: share of its variance`, found.sensitivity.slice(0, 8).map((entry) => ({ label: entry.parameter, value: entry.share, text: percent(entry.share) }))),
    h("p", { class: "quiet" }, found.split));
}

function recipe(parts) {
  const passes = (parts.passes ?? []).map((step) => [step.pass, ...["bits", "group_size", "budget", "share", "count", "min_cosine"].filter((name) => step[name] !== undefined && step[name] !== null).map((name) => `${words(name)} ${step[name]}`)].join(" "));
  return `${passes.join(" + ") || "no pass"} → ${(parts.exports ?? []).map((entry) => (typeof entry === "string" ? entry : `${entry.format}-${entry.type}`)).join(", ")}`;
}

function wanted(now) {
  return `least ${words(now.minimize)} with ${Object.entries(now.gates).map(([name, bound]) => `${words(name)} ${bound}`).join(", ")}`;
}

function ended(now) {
  return Object.entries(now.counts).reduce((sum, [state, number]) => sum + (state === "open" ? 0 : number), 0);
}
