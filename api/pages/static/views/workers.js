// The workers, the queues and the parts that the service needs.

import { get } from "../api.js";
import { fill, h } from "../dom.js";
import { age, bytes, duration } from "../format.js";
import { poll } from "../live.js";
import { badge, empty, heading, row, table, trouble } from "../parts.js";

const COLUMNS = ["Worker", "State", "Queue", "Device", "Memory", "Jobs", "Seen"];

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
        h("small", {}, `${queue.running} running`, queue.queued_gpus || queue.running_gpus ? ` · ${queue.running_gpus} GPUs held, ${queue.queued_gpus} needed` : "", queue.oldest_queued_s ? ` · the oldest waits ${duration(queue.oldest_queued_s)}` : ""))),
      Object.entries(ready.checks ?? {}).map(([name, says]) => h("div", { class: "card" }, h("b", {}, name), h("span", { class: says === "ok" ? "good" : "bad" }, says))));
    if (page.items.length === 0) {
      fill(place, empty("No worker has reported.", h("p", {}, "Jobs wait until a worker runs: ", h("code", {}, "python -m nightpress.worker"), " starts a worker on this machine; `nightpress up` starts its own.")));
      return;
    }
    fill(place, table("Workers", COLUMNS, page.items.map((worker) => row(COLUMNS, [
      h("span", {}, worker.host, h("small", { class: "quiet" }, ` ${worker.id}`)), badge(worker.state), worker.cpu_jobs ? `${worker.queue} + ${worker.cpu_jobs} cpu` : worker.queue, device(worker),
      memory(worker),
      links(worker), h("time", { datetime: worker.last_seen_at }, age(worker.last_seen_at))]))));
  }, (error) => fill(notice, trouble(error)));
}

/** The worker's device, and how many of its GPUs are free. */
function device(worker) {
  if (worker.gpus.length === 0) return worker.device;
  const free = worker.gpus.filter((gpu) => !gpu.held).length;
  return h("span", {}, worker.device, h("small", { class: "quiet" }, ` ${free} of ${worker.gpus.length} free`));
}

/** Links to the jobs that the worker runs, as far as the reader may see them. */
function links(worker) {
  if (worker.job_ids.length === 0) return "–";
  return h("div", {}, worker.job_ids.map((id) => h("div", {}, h("a", { href: `#/jobs/${id}` }, id))));
}

/** The memory in use of each of a worker's GPUs, or the memory that a CPU worker offers. */
function memory(worker) {
  if (worker.gpus.length > 0) return h("div", {}, worker.gpus.map((gpu) => bar(gpu.memory_used, gpu.memory, gpu.uuid)));
  return worker.gpu_memory ? bar(worker.gpu_memory_used, worker.gpu_memory, "") : bytes(worker.memory);
}

/** used: null where NVML did not say it. */
function bar(used, memory, uuid) {
  if (used === null) return h("div", { title: uuid }, `${bytes(memory)} on the GPU`);
  return h("div", { class: "progress", title: uuid },
    h("progress", { max: memory, value: used, "aria-label": `${bytes(used)} of ${bytes(memory)} of GPU memory in use` }),
    h("small", {}, `${bytes(used)} of ${bytes(memory)} on the GPU`));
}
