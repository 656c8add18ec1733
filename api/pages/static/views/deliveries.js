// Results on their way to buckets, the Hub and registries: the list, a delivery with its tries, and the form that delivers a job.

import { get, post } from "../api.js";
import { announce, fill, h, keyed } from "../dom.js";
import { age, bytes, duration, moment, percent } from "../format.js";
import { poll } from "../live.js";
import { badge, button, confirmed, copyable, empty, field, heading, row, table, trouble } from "../parts.js";

const COLUMNS = ["Destination", "State", "Artifact", "Job", "Made", ""];
const TRIES = ["Try", "When", "Sent", "Took", "Outcome"];
const OPEN = new Set(["failed", "cancelled", "pending"]);

export async function deliveries(main, { signal, query }) {
  const job = query.get("job");
  const notice = h("div");
  const place = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  const opened = h("div", { tabindex: "-1" });
  const body = h("tbody");
  fill(main, heading(job ? `Deliveries of ${job}` : "Deliveries"), notice, place, pages, opened, job ? form(job, refresh) : null);
  await poll(signal, 3, refresh, (error) => fill(notice, trouble(error)));

  async function refresh() {
    const page = await get("/v1/deliveries", { job, cursor: query.get("cursor"), limit: 50 }, signal);
    fill(notice);
    if (page.items.length === 0) fill(place, empty("Nothing is delivered yet.", h("p", {}, "An accepted result goes to the destinations of its job and of its model:"), copyable("nightpress submit my-model --recipe int8-encoder --to s3://models/{model}/{job}")));
    else if (body.parentNode === null || !place.contains(body)) fill(place, table("Deliveries, newest first", COLUMNS, [], body));
    keyed(body, page.items, (delivery) => delivery.id, draw);
    const older = new URLSearchParams({ ...(job ? { job } : {}), cursor: page.next_cursor ?? "" });
    fill(pages, page.next_cursor ? h("a", { href: `#/deliveries?${older}` }, "Older") : null);
  }

  function draw(delivery) {
    return row(COLUMNS, [
      h("span", {}, delivery.destination, delivery.error ? h("small", { class: "quiet" }, ` ${delivery.error.message}`) : null),
      h("span", {}, badge(delivery.running ? "running" : delivery.state), delivery.running && delivery.total_bytes ? h("small", {}, ` ${percent(delivery.sent_bytes / delivery.total_bytes)}`) : null),
      delivery.artifact, h("a", { href: `#/jobs/${delivery.job_id}` }, delivery.job_id), h("time", { datetime: delivery.created_at }, age(delivery.created_at)),
      h("div", { class: "row" },
        button("Show", async () => look(delivery.id), { tone: "small", label: `Show ${delivery.id}`, focus: "look" }),
        OPEN.has(delivery.state) && !delivery.running ? button("Try now", async () => {
          await post(`/v1/deliveries/${delivery.id}/retry`);
          announce("It is tried again");
          await refresh();
        }, { tone: "small", label: `Try ${delivery.id} now`, focus: "retry" }) : null,
        delivery.state === "pending" ? button("Cancel", async () => {
          if (!(await confirmed(`Cancel the delivery to ${delivery.destination}? What has arrived stays there.`, "Cancel it"))) return;
          await post(`/v1/deliveries/${delivery.id}/cancel`);
          await refresh();
        }, { tone: "small bad", label: `Cancel ${delivery.id}`, focus: "cancel" }) : null)]);
  }

  async function look(id) {
    const delivery = await get(`/v1/deliveries/${id}`, {}, signal);
    const where = Object.entries(delivery.result ?? {}).filter(([name]) => name !== "files" && name !== "bytes");
    fill(opened, h("section", { class: "card", "aria-labelledby": "opened" }, h("h2", { id: "opened" }, `${delivery.destination}, ${delivery.id}`),
      delivery.error ? h("p", {}, `${delivery.error.message} ${delivery.error.hint}`) : null,
      delivery.next_at ? h("p", {}, `The next try is at ${moment(delivery.next_at)}.`) : null,
      where.map(([name, value]) => h("p", {}, `${name}: `, h("code", {}, String(value)))),
      delivery.log.length === 0 ? h("p", { class: "quiet" }, "No try has ended yet.") : table("Tries", TRIES, delivery.log.map((tried) => row(TRIES, [
        tried.number, moment(tried.at), bytes(tried.sent_bytes), duration(tried.duration_ms / 1000), tried.error?.message ?? "delivered"])))));
    opened.focus();
  }
}

/** The form that delivers a job's result. */
function form(job, saved) {
  const url = h("input", { required: true, maxlength: 1024, pattern: "(s3|hf|oci)://\\S+", placeholder: "hf://organisation/name@main" });
  const place = h("div");
  const element = h("form", { class: "card narrow" }, h("h2", {}, "Deliver it"), place,
    field("Destination", url, "s3://bucket/folder, hf://organisation/name@branch or oci://registry/name:tag that the operator allows. {model}, {job} and {artifact} are filled in."),
    h("button", {}, "Deliver"));
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      await post("/v1/deliveries", { job_id: job, destinations: [url.value.trim()] });
      fill(place);
      announce("It is on its way");
      await saved();
    } catch (error) {
      fill(place, trouble(error));
    }
  });
  return element;
}
