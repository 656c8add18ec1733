"""Messages for people, made from the payload of a webhook's event: a short text for Slack, a subject and a body for e-mail."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

from nightpress.core.wire.webhooks import TEMPLATE_FIELDS

_PAGES = {"job": "jobs", "study": "studies", "schedule": "schedules"}
_MARKS = {"succeeded": "✓", "accepted": "✓", "promoted": "✓", "failed": "✗", "rejected": "✗"}
_LONGEST_SUBJECT = 200


@dataclass(frozen=True)
class Message:
    """`subject` is one line. `text` begins with the same line."""

    subject: str
    text: str


def message_of(payload: Mapping[str, Any], *, template: str | None, public_url: str) -> Message:
    """The message of an event. template: its text with `$` fields, whose first line is the subject; None: the usual text.

    public_url: where people reach the web page; empty: the message has no link.
    """
    fields = fields_of(payload, public_url)
    text = Template(template).safe_substitute(fields) if template else _usual(fields)
    lines = text.strip().splitlines() or [fields["event"]]
    return Message(" ".join(lines[0].split())[:_LONGEST_SUBJECT], "\n".join(lines))


def slack_body(message: Message) -> dict[str, str]:
    """The body of a Slack-compatible incoming webhook. Names that users chose can't make links or mentions."""
    escaped = message.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {"text": escaped}


def fields_of(payload: Mapping[str, Any], public_url: str) -> dict[str, str]:
    """The values of TEMPLATE_FIELDS; empty where the event has none."""
    event, data = str(payload["type"]), payload["data"]
    kind, _, happened = event.partition(".")
    error = data.get("error") or {}
    found = {
        "event": event,
        "id": data.get("id"),
        "name": data.get("name"),
        "model": data.get("model_name"),
        "recipe": data.get("recipe"),
        "state": data.get("state") or happened,
        "verdict": data.get("verdict"),
        "reason": data.get("reason"),
        "error": " ".join(str(error[part]) for part in ("message", "hint") if error.get(part)),
        "job": data.get("id") if kind == "job" else data.get("job_id"),
    }
    page = f"{_PAGES[kind]}/{data.get('id')}" if kind in _PAGES else f"jobs/{data.get('job_id')}"
    found["link"] = f"{public_url.rstrip('/')}/#/{page}" if public_url and event != "webhook.test" else ""
    return {name: str(found[name] or "") for name in TEMPLATE_FIELDS}


def _usual(fields: Mapping[str, str]) -> str:
    if fields["event"] == "webhook.test":
        return "Nightpress: a test message\nMessages of this webhook arrive here."
    kind, _, happened = fields["event"].partition(".")
    outcome = fields["verdict"] or happened
    what = fields["name"] or " · ".join(part for part in (fields["model"], fields["recipe"]) if part) or fields["id"]
    told = f"{happened}, {fields['verdict']}" if fields["verdict"] and fields["verdict"] != happened else happened
    lines = [f"{_MARKS.get(outcome, '•')} {kind.capitalize()} {what}: {told}"]
    if fields["name"] and fields["model"]:
        lines.append(" · ".join(part for part in (fields["model"], fields["recipe"]) if part))
    lines += [fields[part] for part in ("reason", "error") if fields[part]]
    if fields["job"]:
        lines.append(f"nightpress report {fields['job']}")
    lines.append(fields["link"])
    return "\n".join(line for line in lines if line)
