// The key that is in use, and the tenant's others.

import { change, get, post } from "../api.js";
import { fill, h } from "../dom.js";
import { age, moment } from "../format.js";
import { badge, button, confirmed, copyable, empty, facts, field, heading, row, shownOnce, table, trouble } from "../parts.js";
import { QUOTAS, used } from "./tenants.js";

const COLUMNS = ["Key", "State", "Scopes", "Made", "Expires", "Last used", ""];

export async function access(main, { signal, go }) {
  const me = await get("/v1/me", {}, signal);
  const place = h("div");
  fill(main, heading("Keys", me.scopes.includes("admin") ? h("a", { class: "button", href: "#/tenants" }, "Tenants and quotas") : null),
    h("section", { class: "card" }, h("h2", {}, "The key in use"),
      facts([["Tenant", h("code", {}, me.tenant_id)], ["Key", h("code", {}, me.key_id)], ["It may", me.scopes.map((one) => h("span", { class: "label" }, one))],
        ...(me.usage ? QUOTAS.map((quota) => [quota[1].split(",")[0], used(quota, me.quotas, me.usage)]) : [])])),
    place);
  try {
    const page = await get("/v1/keys", { limit: 200 }, signal);
    fill(place, page.items.length === 0 ? empty("No other keys.") : table("Keys", COLUMNS, page.items.map((one) => draw(one, me, go))), make(me, go));
  } catch (error) {
    if (error.status !== 403) throw error;
    fill(place, h("p", { class: "quiet" }, "A key with the scope keys:read sees the others, one with keys:write makes them."));
  }
}

function draw(key, me, go) {
  const state = key.revoked_at ? "revoked" : key.expires_at && Date.parse(key.expires_at) < Date.now() ? "expired" : "active";
  return row(COLUMNS, [
    h("span", {}, h("code", {}, key.id), key.name ? ` ${key.name}` : "", key.id === me.key_id ? h("small", { class: "quiet" }, " in use") : null),
    badge(state), key.scopes.join(", "), age(key.created_at), key.expires_at ? moment(key.expires_at) : "never", key.last_used_at ? age(key.last_used_at) : "never",
    state !== "active" ? "" : h("div", { class: "row" },
      button("Rotate", async () => {
        shown(await post(`/v1/keys/${key.id}/rotate`, {}), go);
      }, { tone: "small", label: `Rotate ${key.id}` }),
      button("Revoke", async () => {
        if (!(await confirmed(`Revoke the key ${key.id}? Whoever uses it is shut out at once.`, "Revoke it"))) return;
        await change("DELETE", `/v1/keys/${key.id}`);
        go("#/access");
      }, { tone: "small bad", label: `Revoke ${key.id}` })),
  ]);
}

function make(me, go) {
  const name = h("input", { maxlength: 100, placeholder: "ci", required: true });
  const days = h("input", { type: "number", min: 1, max: 3650, placeholder: "never" });
  const scopes = me.scopes.map((one) => h("input", { type: "checkbox", value: one, id: `scope-${one}`, checked: one !== "admin" }));
  const place = h("div");
  const form = h("form", { class: "card narrow" }, h("h2", {}, "Make a key"), place, field("Name", name), field("Days until it expires", days),
    h("fieldset", {}, h("legend", {}, "It may"), scopes.map((one) => h("p", { class: "check" }, one, h("label", { for: one.id }, one.value)))), h("button", {}, "Make it"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const expires = days.value ? new Date(Date.now() + Number(days.value) * 86_400_000).toISOString() : null;
      shown(await post("/v1/keys", { name: name.value.trim(), scopes: scopes.filter((one) => one.checked).map((one) => one.value), ...(expires ? { expires_at: expires } : {}) }), go);
    } catch (error) {
      fill(place, trouble(error));
    }
  });
  return form;
}

function shown(made, go) {
  shownOnce("The new key", "Copy it now: it is kept only as a hash and can't be shown again.", made.key, () => go("#/access"));
}
