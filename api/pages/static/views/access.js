// The key in use and the tenant's other keys; for administrators also the keys of another tenant.

import { change, get, post, replace } from "../api.js";
import { fill, h } from "../dom.js";
import { age, moment } from "../format.js";
import { badge, button, confirmed, empty, facts, field, heading, row, show, shownOnce, table, trouble } from "../parts.js";
import { QUOTAS, used } from "./tenants.js";

const SESSION_COLUMNS = ["Person", "State", "Groups", "Began", "Last used", ""];
const COLUMNS = ["Key", "State", "Scopes", "Made", "Expires", "Last used", ""];
/** The scopes of a key that submits jobs and fetches results. Others must be chosen. */
const USUAL = new Set(["jobs:read", "jobs:write", "models:read", "models:write"]);
const OVERLAPS = [[0, "not at all"], [3600, "an hour"], [86_400, "a day"], [7 * 86_400, "a week"]];

export async function access(main, { signal, query, go }) {
  const me = await get("/v1/me", {}, signal);
  const tenant = query.get("tenant") || me.tenant_id;
  const place = h("div");
  const sessions = h("div");
  const again = () => go(address(tenant));
  fill(main, heading(tenant === me.tenant_id ? "Keys" : `Keys of ${tenant}`, me.scopes.includes("admin") ? h("a", { class: "button", href: "#/tenants" }, "Tenants and quotas") : null),
    h("section", { class: "card" }, h("h2", {}, me.person ? "You" : "The key in use"),
      facts([["Tenant", h("code", {}, me.tenant_id)], ["Person", me.person ? `${me.person.name} ${me.person.email}` : null], [me.person ? "Id" : "Key", h("code", {}, me.key_id)], [me.person ? "You may" : "It may", me.scopes.map((scope) => h("span", { class: "label" }, scope))],
        ...(me.usage ? QUOTAS.filter(([name]) => me.usage.currency || !name.startsWith("max_cost")).map((quota) => [quota[1].split(",")[0], used(quota, me.quotas, me.usage)]) : [])])),
    place, sessions);
  await drawSessions(sessions, tenant === me.tenant_id && me.scopes.includes("keys:read"), again, signal);
  try {
    const page = await get("/v1/keys", { tenant_id: tenant, cursor: query.get("cursor"), limit: 50 }, signal);
    fill(place,
      page.items.length === 0 ? empty("No keys.") : table("Keys", COLUMNS, page.items.map((key) => draw(key, me, again))),
      page.next_cursor ? h("nav", { class: "pages", "aria-label": "Pages" }, h("a", { href: address(tenant, page.next_cursor) }, "More")) : null,
      make(me, tenant, again));
  } catch (error) {
    if (error.status !== 403 || tenant !== me.tenant_id) throw error;
    fill(place, h("p", { class: "quiet" }, "To see other keys you need the scope keys:read, to make keys keys:write."));
  }
}

/** The sessions of people who have signed in to this tenant. Nothing where nobody has. */
async function drawSessions(place, may, again, signal) {
  if (!may) return;
  const { items } = await get("/v1/sessions", { limit: 50 }, signal);
  if (items.length === 0) return;
  fill(place, h("h2", {}, "Sessions"), table("Sessions", SESSION_COLUMNS, items.map((session) => row(SESSION_COLUMNS, [
    h("span", {}, session.name, h("small", { class: "quiet" }, ` ${session.email} `), h("code", {}, session.person_id)),
    badge(session.live ? "active" : session.reason ?? "expired"), session.groups.join(", "), age(session.created_at), age(session.seen_at),
    session.live ? button("End", async () => {
      if (!(await confirmed(`End the session of ${session.name}?`, "End it"))) return;
      await change("DELETE", `/v1/sessions/${session.id}`);
      again();
    }, { tone: "small bad", label: `End the session of ${session.name}` }) : "",
  ]))));
}

function address(tenant, cursor = "") {
  return `#/access?${new URLSearchParams({ tenant, ...(cursor ? { cursor } : {}) })}`;
}

function draw(key, me, again) {
  const state = key.revoked_at ? "revoked" : key.expired ? "expired" : "active";
  const own = key.id === me.key_id;
  return row(COLUMNS, [
    h("span", {}, h("code", {}, key.id), key.name ? ` ${key.name}` : "", own ? h("small", { class: "quiet" }, " in use") : null,
      key.rotated_from ? h("small", { class: "quiet" }, " after ", h("code", {}, key.rotated_from)) : null),
    badge(state), key.scopes.join(", "), age(key.created_at), key.expires_at ? moment(key.expires_at) : "never", key.last_used_at ? age(key.last_used_at) : "never",
    state !== "active" ? "" : h("div", { class: "row" },
      button("Rotate", async () => {
        const overlap = await overlapOf(key);
        if (overlap === null) return;
        const made = (await post(`/v1/keys/${key.id}/rotate`, { overlap_s: overlap })).key;
        if (own) replace(made);
        shown(made, again);
      }, { tone: "small", label: `Rotate ${key.id}` }),
      button("Revoke", async () => {
        if (!(await confirmed(`Revoke the key ${key.id}? ${own ? "You are signed in with it and lose access" : "Whoever uses it loses access"} at once.`, "Revoke it"))) return;
        await change("DELETE", `/v1/keys/${key.id}`);
        again();
      }, { tone: "small bad", label: `Revoke ${key.id}` })),
  ]);
}

/** Ask for how many seconds the old key keeps working. Null: the rotation was cancelled. */
function overlapOf(key) {
  const choice = h("select", {}, OVERLAPS.map(([seconds, text]) => h("option", { value: seconds, selected: seconds === 3600 }, text)));
  return new Promise((resolve) => {
    const dialog = h("dialog", { "aria-labelledby": "rotated" },
      h("h2", { id: "rotated" }, `Rotate ${key.id}?`), h("p", {}, "The new key has the same name, scopes and expiry."),
      h("form", { method: "dialog" }, field("The old key keeps working for", choice),
        h("div", { class: "row" }, h("button", { value: "yes", class: "primary" }, "Make the new key"), h("button", { value: "no" }, "Cancel"))));
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes" ? Number(choice.value) : null));
    show(dialog);
  });
}

function make(me, tenant, again) {
  const name = h("input", { maxlength: 100, placeholder: "ci", required: true });
  const days = h("input", { type: "number", min: 1, max: 3650, placeholder: "never" });
  const scopes = me.scopes.map((scope) => h("input", { type: "checkbox", value: scope, id: `scope-${scope}`, checked: USUAL.has(scope) }));
  const place = h("div");
  const form = h("form", { class: "card narrow" }, h("h2", {}, tenant === me.tenant_id ? "Make a key" : `Make a key for ${tenant}`), place, field("Name", name), field("Days until it expires", days),
    h("fieldset", {}, h("legend", {}, "It may"), scopes.map((box) => h("p", { class: "check" }, box, h("label", { for: box.id }, box.value)))), h("button", {}, "Make it"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const expires = days.value ? new Date(Date.now() + Number(days.value) * 86_400_000).toISOString() : null;
      shown((await post("/v1/keys", {
        name: name.value.trim(), scopes: scopes.filter((box) => box.checked).map((box) => box.value),
        ...(expires ? { expires_at: expires } : {}), ...(tenant === me.tenant_id ? {} : { tenant_id: tenant }),
      })).key, again);
    } catch (error) {
      fill(place, trouble(error));
    }
  });
  return form;
}

function shown(key, then) {
  shownOnce("The new key", "Copy it now: only its hash is stored, so it can't be shown again.", key, then);
}
