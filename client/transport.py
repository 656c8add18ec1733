"""What both clients share around a request: headers, whether and when to try again, and reading the answer."""

import random
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from client.calls import Call
from client.errors import ApiError, ClientError, UnreachableError, retry_after_of
from core.version import VERSION

Answer = TypeVar("Answer")

_TRY_AGAIN = frozenset({502, 503, 504})


@dataclass(frozen=True)
class Options:
    """Where the server is, and how patient to be. Durations in seconds."""

    api_url: str
    api_key: str | None = None
    timeout_s: float = 30.0
    retries: int = 3
    backoff_s: float = 0.2
    longest_pause_s: float = 30.0

    def http_options(self) -> dict[str, Any]:
        """Arguments for httpx.Client and httpx.AsyncClient alike."""
        return {
            "base_url": self.api_url,
            "timeout": httpx.Timeout(
                120.0, connect=5.0
            ),  # of transfers, where a store may think for long; calls say their own
            "headers": {"User-Agent": f"nightpress/{VERSION}"},
            "follow_redirects": True,
            # A proxy for the world outside would not find this machine's own loopback.
            "trust_env": httpx.URL(self.api_url).host not in {"127.0.0.1", "localhost", "::1"},
        }

    def headers(self) -> dict[str, str]:
        """The key travels with each request to the API, never as a default that presigned URLs elsewhere would get too."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def request(self, call: Call[Any]) -> dict[str, Any]:
        """Arguments for `request()` of either httpx client."""
        return {
            "method": call.method,
            "url": call.path,
            "params": list(call.params) or None,
            "json": call.json,
            "headers": {**self.headers(), **call.headers},
            "timeout": httpx.Timeout(call.timeout_s or self.timeout_s, connect=5.0),
        }


class Attempts:
    """Counts the tries of one request and says how long to pause before the next; None: there is no next."""

    def __init__(self, options: Options, *, repeatable: bool, accept: frozenset[int] = frozenset()) -> None:
        self._options = options
        self._repeatable = repeatable
        self._accept = accept
        self._made = 0

    def pause_after(self, outcome: httpx.Response | httpx.TransportError) -> float | None:
        if not self._worth_another(outcome) or self._made >= self._options.retries:
            return None
        asked = retry_after_of(outcome) if isinstance(outcome, httpx.Response) else None
        pause = self._options.backoff_s * 2.0**self._made * random.uniform(0.75, 1.25)
        self._made += 1
        return min(max(pause, asked or 0.0), self._options.longest_pause_s)

    def _worth_another(self, outcome: httpx.Response | httpx.TransportError) -> bool:
        if isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout):
            return True  # nothing was sent yet, so nothing can happen twice
        if isinstance(outcome, httpx.TransportError):
            return self._repeatable and not isinstance(outcome, httpx.UnsupportedProtocol)
        return self._repeatable and outcome.status_code in _TRY_AGAIN - self._accept


def read_answer(call: Call[Answer], options: Options, outcome: httpx.Response | httpx.TransportError) -> Answer:
    """Parse what came of a call, or raise ApiError or UnreachableError."""
    if isinstance(outcome, httpx.TransportError):
        raise not_reachable(options.api_url, outcome) from outcome
    if outcome.status_code >= 400 and outcome.status_code not in call.accept:
        raise ApiError.from_response(outcome)
    try:
        return call.parse(outcome)
    except ValueError as error:  # pydantic's and json's errors both are
        raise ClientError(
            f"{call.method} {call.path} answered something this client cannot read.",
            hint=f"Is {options.api_url} a Nightpress API, and of a version near {VERSION}?",
        ) from error


def not_reachable(url: str, error: httpx.TransportError) -> UnreachableError:
    """Say in a person's words why no answer came."""
    if isinstance(error, httpx.UnsupportedProtocol):
        return UnreachableError(f"{url!r} is not a web address.", hint="It should look like http://127.0.0.1:8790.")
    if isinstance(error, httpx.ConnectError):
        why = "nothing answers there"
    elif isinstance(error, httpx.TimeoutException):
        why = "it did not answer in time"
    else:
        why = "the connection broke off"
    return UnreachableError(
        f"Cannot reach the Nightpress API at {url}: {why}.",
        hint="Start one with `nightpress up`, or name another with --api or NIGHTPRESS_API_URL. `nightpress doctor` looks closer.",
    )
