"""Delivers what waits, by the schedule of Standard Webhooks. A receiver that is slow or down holds up nobody but itself."""

import datetime as dt
import json
import logging
import random
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any

from nightpress.core.errors import NightpressError
from nightpress.core.numbers import whole_number
from nightpress.core.service.webhooks.outbound import Answer, post
from nightpress.core.service.webhooks.signing import sign
from nightpress.core.service.webhooks.store import DueDelivery, WebhookStore
from nightpress.core.service.webhooks.targets import Resolve, check_target, resolve_name
from nightpress.core.settings import Settings
from nightpress.core.version import VERSION

#: The pause after each try that failed: three days in all.
PAUSES_S = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
_JITTER = 0.2
_LONGEST_ASKED_S = 24 * 3600.0
_AT_A_TIME = 8

log = logging.getLogger(__name__)


class Courier:
    """One a control process; `deliver` may run in any number of them."""

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
        self._threads = ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="webhook")
        self._lock = threading.Lock()
        self._busy = 0

    def deliver(self, now: dt.datetime | None = None) -> int:
        """Start a try of each delivery that is due, and don't wait for the answers. Returns how many."""
        free = 2 * _AT_A_TIME - self._busy
        if free <= 0:
            return 0
        taken = self._store.take_due(now or self._store.now(), limit=free)
        with self._lock:
            self._busy += len(taken)
        for due in taken:
            self._threads.submit(self._run, due, now)
        return len(taken)

    def close(self) -> None:
        """Wait for the tries that are under way: ten seconds at most."""
        self._threads.shutdown(wait=True)

    def _run(self, due: DueDelivery, now: dt.datetime | None) -> None:
        try:
            self.attempt(due, now)
        except NightpressError as error:
            log.warning("Delivery %s could not be settled, and is tried again: %s", due.id, error)
        except Exception:
            log.exception("Delivery %s: an unexpected error", due.id)
        finally:
            with self._lock:
                self._busy -= 1

    def attempt(self, due: DueDelivery, now: dt.datetime | None = None) -> None:
        """One try, and what follows from it."""
        began = time.monotonic()
        clock = self._store.now()  # a receiver refuses what was signed five minutes off: this host's clock may be wrong
        body = json.dumps(due.payload, separators=(",", ":"), ensure_ascii=False).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "User-Agent": f"nightpress/{VERSION}",
            **sign(due.secrets, due.id, int(clock.timestamp()), body),
        }
        answer, fault = None, None
        try:
            # Checked again at each try: a name may mean another address now than when it was registered.
            target = check_target(due.url, self._settings.webhook_networks, resolve=self._resolve)
            headers["Host"] = _host_of(target.host, target.port)
            answer = post(target, headers, body, context=self._context)
        except (NightpressError, ConnectionError, TimeoutError) as error:
            fault = error.message if isinstance(error, NightpressError) else str(error)
        except Exception:
            # A receiver says what it likes: whatever that does to us uses up a try, so that the tries come to an end.
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
        pause = pause_after(due.attempts, answer, clock)
        if gone or pause is None:
            self._store.settle(due, state="failed", next_at=None, attempt=tried, gone=gone)
            return
        moment = (now or clock + dt.timedelta(seconds=time.monotonic() - began)) + dt.timedelta(seconds=pause)
        self._store.settle(due, state="pending", next_at=moment, attempt=tried)


def pause_after(attempts: int, answer: Answer | None, now: dt.datetime) -> float | None:
    """Seconds until the next try after so many. None: there is none. A receiver's Retry-After makes it longer, never shorter."""
    if attempts > len(PAUSES_S):
        return None
    pause = PAUSES_S[attempts - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)
    return max(pause, _asked_for(answer, now) if answer else 0.0)


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
