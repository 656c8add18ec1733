// For administrators: tenants with their use and their quotas.

import { change, get } from "../api.js";
import { announce, fill, h } from "../dom.js";
import { bytes, duration, money } from "../format.js";
import { poll } from "../live.js";
import { button, empty, field, heading, row, table, trouble } from "../parts.js";

const COLUMNS = ["Tenant", "Queued", "Running", "Storage", "GPU time this month", "Cost today", "Cost this month", "Requests a minute", ""];
/** Quotas: field, label, field of the use, and how its values are shown. */
export const QUOTAS = [
  ["max_queued_jobs", "Queued jobs", "queued_jobs", String],
  ["max_running_jobs", "Running jobs", "running_jobs", String],
  ["max_storage_bytes", "Storage, bytes", "storage_bytes", bytes],
  ["max_gpu_seconds_month", "GPU seconds a month", "gpu_seconds_month", duration],
  ["max_cost_day", "Money a day", "cost_day", String],
  ["max_cost_month", "Money a month", "cost_month", String],
  ["rate_limit_per_minute", "Requests a key and minute", null, String],
];

/** The use of a quota: "3 of 10", or "3" without a bound. */
export function used([name, , use, text], quotas, usage) {
  if (name.startsWith("max_cost")) text = (value) => money({ amount: value, currency: usage.currency }) ?? String(value);
  const bound = quotas[name] ? text(quotas[name]) : null;
  if (use === null) return bound ?? "no bound";
  return bound ? `${text(usage[use])} of ${bound}` : text(usage[use]);
}

export async function tenants(main, { signal, query, go }) {
  const notice = h("div");
  const place = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  const editing = h("div");
  fill(main, h("p", { class: "crumbs" }, h("a", { href: "#/access" }, "Keys")), heading("Tenants"), notice, editing, place, pages, fresh(go));
  await poll(signal, 10, load, (error) => fill(notice, trouble(error)));

  async function load() {
    const page = await get("/v1/admin/tenants", { cursor: query.get("cursor"), limit: 50 }, signal);
    fill(notice);
    fill(pages, page.next_cursor ? h("a", { href: `#/tenants?cursor=${encodeURIComponent(page.next_cursor)}` }, "More") : null);
    if (page.items.length === 0) fill(place, empty("No tenants yet."));
    else fill(place, table("Tenants, with what they use", COLUMNS, page.items.map((tenant) => row(COLUMNS, [
      h("a", { href: `#/access?${new URLSearchParams({ tenant: tenant.id })}`, "aria-label": `Keys of ${tenant.id}` }, h("code", {}, tenant.id)), QUOTAS.map((quota) => used(quota, tenant.quotas, tenant.usage)),
      button("Quotas", async () => fill(editing, form(await get(`/v1/admin/tenants/${encodeURIComponent(tenant.id)}`, {}, signal), load)), { tone: "small", label: `Quotas of ${tenant.id}` }),
    ].flat()))));
  }
}

/** The form of a new tenant. A tenant exists when it has a key, so this leads to its keys. */
function fresh(go) {
  const name = h("input", { required: true, maxlength: 64, pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]*", placeholder: "search-team" });
  return h("form", {
    class: "card narrow",
    onsubmit: (event) => {
      event.preventDefault();
      go(`#/access?${new URLSearchParams({ tenant: name.value.trim() })}`);
    },
  }, h("h2", {}, "New tenant"), field("Name", name, "The tenant is created with its first key."), h("button", {}, "To its keys"));
}

/** The form of a tenant's quotas. Empty: the installation's default. 0: unlimited. */
function form(tenant, saved) {
  const inputs = QUOTAS.map(([name]) => h("input", { type: "number", min: 0, step: 1, value: tenant.own[name] ?? "", placeholder: `${tenant.quotas[name]}` }));
  const place = h("div");
  const element = h("form", { class: "card narrow" }, h("h2", {}, `Quotas of ${tenant.id}`), place,
    QUOTAS.map(([, label], at) => field(label, inputs[at])), h("p", { class: "quiet" }, "Empty: the installation's default. 0: unlimited."),
    h("div", { class: "row" }, h("button", { class: "primary" }, "Save"), h("button", { type: "button", onclick: () => element.remove() }, "Cancel")));
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    const wanted = Object.fromEntries(QUOTAS.map(([name], at) => [name, inputs[at].value === "" ? null : Number(inputs[at].value)]));
    try {
      await change("PATCH", `/v1/admin/tenants/${encodeURIComponent(tenant.id)}`, wanted, tenant.version);
      element.remove();
      announce("Saved");
      await saved();
    } catch (error) {
      fill(place, trouble(error));
    }
  });
  return element;
}
