"""Sends pending deliveries, with the retry schedule of Standard Webhooks. A receiver that is slow or down does not delay others."""

import datetime as dt
import json
import logging
import ssl
import time
from email.utils import parsedate_to_datetime
from typing import Any

from nightpress.core.errors import NightpressError
from nightpress.core.numbers import whole_number
from nightpress.core.outbound import Resolve, resolve_name
from nightpress.core.service import backoff
from nightpress.core.service.dispatch.threads import Threads
from nightpress.core.service.notifications.mail import check_recipient, send_mail
from nightpress.core.service.notifications.messages import Message, message_of, slack_body
from nightpress.core.service.webhooks.outbound import Answer, post
from nightpress.core.service.webhooks.signing import sign
from nightpress.core.service.webhooks.store import DueDelivery, WebhookStore
from nightpress.core.service.webhooks.targets import check_target
from nightpress.core.settings import Settings
from nightpress.core.version import VERSION

_LONGEST_ASKED_S = 24 * 3600.0
_AT_A_TIME = 8

log = logging.getLogger(__name__)


class Courier:
    """Sends deliveries in threads. A control process has one Courier; any number of processes may run `deliver`."""

    def __init__(
        self,
        store: WebhookStore,
        settings: Settings,
        *,
        resolve: Resolve = resolve_name,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._store = store
        self._settings = settings
        self._resolve = resolve
        self._context = context
        self._threads = Threads[DueDelivery]("webhook", at_a_time=_AT_A_TIME)

    def deliver(self, now: dt.datetime | None = None) -> int:
        """Start an attempt of each delivery that is due, without waiting for the answers. Returns the number of attempts."""
        return self._threads.start(
            lambda room: self._store.take_due(now or self._store.now(), limit=room),
            lambda due: self.attempt(due, now),
        )

    def close(self) -> None:
        """Wait for the running attempts. Each ends after ten seconds at most."""
        self._threads.close()

    def attempt(self, due: DueDelivery, now: dt.datetime | None = None) -> None:
        """Send a delivery once, and store the result and the time of the next attempt."""
        began = time.monotonic()
        # The database's time: a receiver refuses a timestamp that is five minutes off, and this host's clock may be wrong.
        clock = self._store.now()
        answer, fault = None, None
        try:
            answer = self._mail(due, clock) if due.kind == "email" else self._post(due, clock)
        except (NightpressError, ConnectionError, TimeoutError) as error:
            fault = error.message if isinstance(error, NightpressError) else str(error)
        except Exception:
            # A receiver may answer anything. An error that its answer causes here counts as a failed attempt, so that attempts end.
            log.exception("Delivery %s: an unexpected error", due.id)
            fault = "The answer could not be read."
        tried: dict[str, Any] = {
            "status": answer.status if answer else None,
            "error": fault,
            "duration_ms": round((time.monotonic() - began) * 1000),
        }
        if answer is not None and 200 <= answer.status < 300:
            self._store.settle(due, state="delivered", next_at=None, attempt=tried)
            return
        gone = answer is not None and answer.status == 410
        refused = due.kind == "email" and answer is not None and answer.status >= 500  # SMTP: for good
        pause = None if refused else pause_after(due.attempts, answer, clock)
        if gone or pause is None:
            self._store.settle(due, state="failed", next_at=None, attempt=tried, gone=gone)
            return
        moment = (now or clock + dt.timedelta(seconds=time.monotonic() - began)) + dt.timedelta(seconds=pause)
        self._store.settle(due, state="pending", next_at=moment, attempt=tried)

    def _post(self, due: DueDelivery, clock: dt.datetime) -> Answer:
        if due.kind == "slack":
            body, signature = _json(slack_body(self._message(due))), {}
        else:
            body = _json(due.payload)
            signature = sign(due.secrets, due.id, int(clock.timestamp()), body)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "User-Agent": f"nightpress/{VERSION}",
            **signature,
        }
        # Check again at each attempt: the name may resolve to another address than when the webhook was registered.
        target = check_target(due.url, self._settings.webhook_networks, resolve=self._resolve)
        headers["Host"] = _host_of(target.host, target.port)
        return post(target, headers, body, context=self._context)

    def _mail(self, due: DueDelivery, clock: dt.datetime) -> Answer:
        recipient = check_recipient(due.url, self._settings)
        message = self._message(due)
        code, text = send_mail(recipient, message, self._settings, message_id=due.id, at=clock, context=self._context)
        return Answer(code, {}, text.encode())

    def _message(self, due: DueDelivery) -> Message:
        return message_of(due.payload, template=due.template, public_url=self._settings.public_url)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def pause_after(attempts: int, answer: Answer | None, now: dt.datetime) -> float | None:
    """Seconds from the `attempts`-th attempt to the next; None: there is no next. Retry-After can only make the pause longer."""
    pause = backoff.pause_after(attempts)
    return None if pause is None else max(pause, _asked_for(answer, now) if answer else 0.0)


def _asked_for(answer: Answer, now: dt.datetime) -> float:
    raw = answer.headers.get("retry-after", "")
    seconds = whole_number(raw, digits=100)
    if seconds is not None:
        return min(float(seconds), _LONGEST_ASKED_S)
    try:
        wait = (parsedate_to_datetime(raw) - now).total_seconds()
    except (ValueError, TypeError, LookupError, ArithmeticError):
        return 0.0
    return min(max(wait, 0.0), _LONGEST_ASKED_S)


def _host_of(host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port in {80, 443} else f"{name}:{port}"
