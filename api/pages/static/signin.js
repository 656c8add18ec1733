// Signing in by the organisation's accounts: the button, why it failed, and who is signed in.

import { get, key } from "./api.js";
import { h } from "./dom.js";

const REASONS = {
  forbidden: "You have signed in, but none of your groups may use this service. Ask its operator.",
  source_unavailable: "The provider that people sign in with doesn't answer. Try again in a moment.",
  conflict: "This sign-in was finished before. Begin again.",
};

/** The error in the address that the server leads back to; null without one. */
export function reasonOf(hash) {
  const code = hash.match(/^#sign-in=([a-z_]+)$/)?.[1];
  if (code === undefined) return null;
  history.replaceState(null, "", location.pathname);
  return new Error(REASONS[code] ?? "You are not signed in: the sign-in was refused, took too long, or belongs to another browser. Begin again.");
}

/** A button that leads to the provider, where there is one. */
export function provider() {
  const place = h("div");
  const goOn = location.hash.startsWith("#/") ? location.hash : "#/jobs";
  get("/auth/provider").then((found) => {
    if (found.issuer) place.append(h("p", {}, h("a", { class: "button primary", href: `/auth/sign-in?${new URLSearchParams({ place: goOn })}` }, `Sign in with ${found.name}`)), h("p", { class: "quiet" }, "or with an API key:"));
  }).catch(() => undefined);
  return place;
}

/** Who is signed in, and for a person of several tenants a choice among them. Empty for a key. */
export function person() {
  const place = h("span", { class: "quiet" });
  if (key()) return place;
  get("/v1/me").then((me) => {
    if (me.person === null) return;
    place.append(me.person.name, " ");
    if (me.person.tenants.length < 2) return;
    const choice = h("select", { "aria-label": "Tenant" }, me.person.tenants.map((tenant) => h("option", { value: tenant, selected: tenant === me.tenant_id }, tenant)));
    choice.addEventListener("change", () => location.assign(`/auth/sign-in?${new URLSearchParams({ tenant: choice.value })}`));
    place.append(choice);
  }).catch(() => undefined);
  return place;
}
