// The list of webhooks, a webhook with its messages and their tries, and the form of a webhook.

import { change, get, post } from "../api.js";
import { announce, fill, h, keyed } from "../dom.js";
import { age, duration, moment } from "../format.js";
import { newest, poll } from "../live.js";
import { badge, button, confirmed, copyable, empty, facts, field, heading, row, shownOnce, table, trouble } from "../parts.js";

const COLUMNS = ["Webhook", "State", "Events", "Made"];
const DELIVERIES = ["Message", "State", "Tries", "Written", "Next try", ""];
const TRIES = ["Try", "When", "Answer", "Took"];
const EVENTS = [["job.succeeded", "a job succeeded"], ["job.failed", "a job failed"], ["job.cancelled", "a job was cancelled"],
  ["study.succeeded", "a study succeeded"], ["study.failed", "a study failed"], ["study.cancelled", "a study was cancelled"],
  ["schedule.failed", "a schedule's run failed"], ["schedule.skipped", "a schedule's run was skipped"], ["model.promoted", "a result was promoted"]];
const USUAL = new Set(["job.succeeded", "job.failed", "job.cancelled"]);
const KINDS = [["standard", "Signed JSON, for programs"], ["slack", "Slack, or what is compatible with it"], ["email", "E-mail"]];
const KEEP_IT = "Copy it now: receivers check signatures with it, and it can't be shown again.";

export async function webhooks(main, { signal, query, go }) {
  const notice = h("div");
  const making = h("div");
  const place = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  fill(main, heading("Webhooks", button("New webhook", async () => fill(making, form(go)), { tone: "primary" })), notice, making, place, pages);
  await poll(signal, 5, async () => {
    const page = await get("/v1/webhooks", { cursor: query.get("cursor"), limit: 50 }, signal);
    fill(notice);
    if (page.items.length === 0) fill(place, empty("No webhooks yet.", h("p", {}, "A webhook gets a message when a job ends, a study finds its winner or a result is promoted: a program, a channel or a mailbox.")));
    else fill(place, table("Webhooks, newest first", COLUMNS, page.items.map((hook) => row(COLUMNS, [
      h("a", { href: `#/webhooks/${hook.id}` }, hook.url), state(hook), told(hook), h("time", { datetime: hook.created_at }, age(hook.created_at))]))));
    fill(pages, page.next_cursor ? h("a", { href: `#/webhooks?cursor=${encodeURIComponent(page.next_cursor)}` }, "Older") : null);
  }, (error) => fill(notice, trouble(error)));
}

function state(hook) {
  return h("span", {}, badge(hook.enabled ? "active" : "disabled"), hook.disabled_reason ? h("small", {}, ` ${hook.disabled_reason}`) : null);
}

function told(hook) {
  return EVENTS.filter(([name]) => hook.events.includes(name)).map(([, text]) => text).join(", ");
}

export async function webhook(main, { signal, query, go }, id) {
  const path = `/v1/webhooks/${encodeURIComponent(id)}`;
  const head = h("div");
  const notice = h("div");
  const editing = h("div");
  const messages = h("div");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  const opened = h("div", { tabindex: "-1" });
  const body = h("tbody");
  fill(main, head, notice, editing, h("section", { "aria-labelledby": "messages" }, h("h2", { id: "messages" }, "Messages"), messages, pages), opened);
  const show = newest(drawHead);
  await poll(signal, 3, refresh, (error) => fill(notice, trouble(error)));

  async function refresh() {
    const [hook, page] = await Promise.all([get(path, {}, signal), get(`${path}/deliveries`, { cursor: query.get("cursor"), limit: 50 }, signal)]);
    fill(notice);
    show(hook);
    if (page.items.length === 0) fill(messages, empty("Nothing was sent yet.", h("p", {}, "Send a test to see whether it arrives.")));
    else if (body.parentNode === null || !messages.contains(body)) fill(messages, table("Messages, newest first", DELIVERIES, [], body));
    keyed(body, page.items, (message) => message.id, draw);
    fill(pages, page.next_cursor ? h("a", { href: `#/webhooks/${id}?cursor=${encodeURIComponent(page.next_cursor)}` }, "Older") : null);
  }

  /** Its buttons name the version that they change. */
  function drawHead(hook) {
    document.title = `${hook.url} · Nightpress`;
    fill(head, title(hook));
  }

  function title(hook) {
    return [
      h("p", { class: "crumbs" }, h("a", { href: "#/webhooks" }, "Webhooks"), " / ", h("code", {}, hook.id)),
      heading(hook.url,
        button("Send a test", async () => {
          await post(`${path}/test`);
          announce("A test is on its way");
          await refresh();
        }, { tone: "small" }),
        button(hook.enabled ? "Switch off" : "Switch on", async () => {
          show(await change("PATCH", path, { enabled: !hook.enabled }, hook.version));
          announce(hook.enabled ? "It is switched off" : "It is switched on");
        }, { tone: "small" }),
        button("Edit", async () => fill(editing, form(go, hook, show)), { tone: "small" }),
        hook.kind !== "standard" ? null : button("Rotate the secret", async () => {
          if (!(await confirmed("Make a new secret? For a day, messages are signed with the old secret too.", "Make it", { tone: "primary" }))) return;
          const renewed = await post(`${path}/rotate`, {});
          show(renewed.webhook);
          shownOnce("The new secret", KEEP_IT, renewed.secret);
        }, { tone: "small" }),
        button("Delete", async () => {
          if (!(await confirmed(`Delete the webhook to ${hook.url}? Messages that wait are not sent.`, "Delete it"))) return;
          await change("DELETE", path, undefined, hook.version);
          go("#/webhooks");
        }, { tone: "small bad" })),
      facts([["State", state(hook)], ["Kind", KINDS.find(([name]) => name === hook.kind)?.[1]], ["Text", hook.template || null], ["Events", told(hook)], ["Made", moment(hook.created_at)], ["By the key", hook.created_by ? h("code", {}, hook.created_by) : null]]),
    ];
  }

  function draw(message) {
    return row(DELIVERIES, [
      h("span", {}, message.event, h("small", { class: "quiet" }, ` ${message.id}`)), badge(message.state), message.attempts,
      h("time", { datetime: message.created_at }, moment(message.created_at)),
      message.next_at ? h("time", { datetime: message.next_at }, moment(message.next_at)) : "–",
      h("div", { class: "row" },
        button("Show", async () => look(message.id), { tone: "small", label: `Show ${message.id}`, focus: "look" }),
        button("Send again", async () => {
          await post(`${path}/deliveries/${message.id}/redeliver`);
          announce("It is sent again");
          await refresh();
        }, { tone: "small", label: `Send ${message.id} again`, focus: "again" }))]);
  }

  async function look(message) {
    const delivery = await get(`${path}/deliveries/${message}`, {}, signal);
    fill(opened, h("section", { class: "card", "aria-labelledby": "opened" }, h("h2", { id: "opened" }, `${delivery.event}, ${delivery.id}`),
      delivery.log.length === 0 ? h("p", { class: "quiet" }, "It was not tried yet.") : table("Tries", TRIES, delivery.log.map((tried) => row(TRIES, [
        tried.number, moment(tried.at), tried.error ?? `status ${tried.status}`, duration(tried.duration_ms / 1000)]))),
      h("h3", {}, "What is sent"), copyable(JSON.stringify(delivery.payload, null, 2))));
    opened.focus();
  }
}

/** The form of a new webhook, or of an existing one: `If-Match` then refuses an edit of an older version. */
function form(go, existing = null, saved = null) {
  const url = h("input", { type: "url", required: true, maxlength: 2048, placeholder: "https address for the messages", value: existing?.url ?? "" });
  const kind = h("select", {}, KINDS.map(([name, text]) => h("option", { value: name }, text)));
  const words = h("textarea", { rows: 3, maxlength: 2000, placeholder: "$model is $verdict" }, existing?.template ?? "");
  const text = field("Text", words, "Optional. $name, $model, $verdict, $error, $link and so on are filled in; the first line is a mail's subject.");
  const show = () => { text.hidden = (existing?.kind ?? kind.value) === "standard"; };
  kind.addEventListener("change", show);
  show();
  const events = EVENTS.map(([name]) => h("input", { type: "checkbox", value: name, id: `event-${name}`, checked: existing ? existing.events.includes(name) : USUAL.has(name) }));
  const place = h("div");
  const element = h("form", { class: "card narrow" }, h("h2", {}, existing ? "Edit the webhook" : "New webhook"), place,
    existing ? null : field("Kind", kind),
    field("Address", url, "https on the internet, or in a network that the operator has allowed; mailto:name@example.com for e-mail."),
    text,
    h("fieldset", {}, h("legend", {}, "Send a message when"), events.map((box, at) => h("p", { class: "check" }, box, h("label", { for: box.id }, EVENTS[at][1])))),
    h("div", { class: "row" }, h("button", { class: "primary" }, existing ? "Save" : "Make it"), h("button", { type: "button", onclick: () => element.remove() }, "Cancel")));
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    const wanted = { ...((existing?.kind ?? kind.value) === "standard" ? {} : { template: words.value.trim() }), url: url.value.trim(), events: events.filter((box) => box.checked).map((box) => box.value) };
    try {
      if (existing) {
        saved(await change("PATCH", `/v1/webhooks/${existing.id}`, wanted, existing.version));
        element.remove();
      } else {
        const made = await post("/v1/webhooks", { kind: kind.value, ...wanted });
        element.remove();
        if (made.secret === null) go(`#/webhooks/${made.webhook.id}`);
        else shownOnce("The webhook's secret", KEEP_IT, made.secret, () => go(`#/webhooks/${made.webhook.id}`));
      }
    } catch (error) {
      fill(place, trouble(error));
    }
  });
  return element;
}
