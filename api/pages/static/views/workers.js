// The workers, the queues and the parts that the service needs.

import { get } from "../api.js";
import { fill, h } from "../dom.js";
import { age, bytes, duration } from "../format.js";
import { poll } from "../live.js";
import { badge, empty, heading, row, table, trouble } from "../parts.js";

const COLUMNS = ["Worker", "State", "Queue", "Device", "Memory", "Job", "Seen"];

export async function workers(main, { signal }) {
  const notice = h("div");
  const cards = h("div", { class: "cards" });
  const place = h("div");
  fill(main, heading("Workers"), notice, cards, place);
  await poll(signal, 3, async () => {
    const [page, ready, waiting] = await Promise.all([
      get("/v1/workers", {}, signal), get("/readyz", {}, signal).catch((error) => error.problem ?? {}), get("/v1/queues", {}, signal)]);
    fill(notice);
    fill(cards,
      waiting.items.map((queue) => h("div", { class: "card" }, h("b", {}, `Queue ${queue.name}`), h("span", {}, `${queue.queued} waiting`),
        h("small", {}, `${queue.running} running`, queue.oldest_queued_s ? ` · the oldest waits ${duration(queue.oldest_queued_s)}` : ""))),
      Object.entries(ready.checks ?? {}).map(([name, says]) => h("div", { class: "card" }, h("b", {}, name), h("span", { class: says === "ok" ? "good" : "bad" }, says))));
    if (page.items.length === 0) {
      fill(place, empty("No worker has reported.", h("p", {}, "Jobs wait until a worker runs: ", h("code", {}, "python -m nightpress.worker"), " starts a worker on this machine; `nightpress up` starts its own.")));
      return;
    }
    fill(place, table("Workers", COLUMNS, page.items.map((worker) => row(COLUMNS, [
      h("span", {}, worker.host, h("small", { class: "quiet" }, ` ${worker.id}`)), badge(worker.state), worker.queue, worker.device,
      memory(worker),
      worker.job_id ? h("a", { href: `#/jobs/${worker.job_id}` }, worker.job_id) : "–", h("time", { datetime: worker.last_seen_at }, age(worker.last_seen_at))]))));
  }, (error) => fill(notice, trouble(error)));
}

/** The memory in use of a GPU worker's GPU, or the memory that a CPU worker offers. */
function memory(worker) {
  if (!worker.gpu_memory) return bytes(worker.memory);
  return h("div", { class: "progress" },
    h("progress", { max: worker.gpu_memory, value: worker.gpu_memory_used, "aria-label": `${bytes(worker.gpu_memory_used)} of ${bytes(worker.gpu_memory)} of GPU memory in use` }),
    h("small", {}, `${bytes(worker.gpu_memory_used)} of ${bytes(worker.gpu_memory)} on the GPU`));
}
