"""The rules of a request: its headers, whether and when it is sent again, and how its answer is read."""

import random
import time
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from nightpress.client.calls import Call
from nightpress.client.errors import ApiError, ClientError, UnreachableError, retry_after_of
from nightpress.client.sign_ins import SignInTokens
from nightpress.core.version import VERSION

Answer = TypeVar("Answer")

_GATEWAYS = frozenset({502, 504})  #: a proxy lost the server, which may have done what was asked
_TRY_AGAIN = _GATEWAYS | {503}


@dataclass(frozen=True)
class Options:
    """Address, key and patience of a client. Durations are in seconds."""

    api_url: str
    api_key: str | None = None
    sign_in: SignInTokens | None = None  #: instead of a key
    timeout_s: float = 30.0
    retries: int = 3
    backoff_s: float = 0.2
    longest_pause_s: float = 30.0

    def http_options(self) -> dict[str, Any]:
        """Arguments for httpx.Client and httpx.AsyncClient alike."""
        return {
            "base_url": self.api_url,
            # For transfers, where a store may take long to answer. Calls have timeouts of their own.
            "timeout": httpx.Timeout(120.0, connect=5.0),
            "headers": {"User-Agent": f"nightpress/{VERSION}"},
            "follow_redirects": True,
            # A proxy on another machine can't reach this machine's loopback.
            "trust_env": httpx.URL(self.api_url).host not in {"127.0.0.1", "localhost", "::1"},
        }

    def headers(self) -> dict[str, str]:
        """The key, or the token of a sign-in, which may first be refreshed, for requests to the API. It is no default header of the httpx client: presigned URLs elsewhere must not get it."""
        if self.api_key:
            return {"Authorization": f"Bearer {self.api_key}"}
        if self.sign_in is None:
            return {}
        tenant = {"X-Nightpress-Tenant": self.sign_in.tenant} if self.sign_in.tenant else {}
        return {"Authorization": f"Bearer {self.sign_in.token()}", **tenant}

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


class Retry:
    """Counts the tries of a request and says how long to pause before the next."""

    def __init__(
        self,
        options: Options,
        *,
        repeatable: bool,
        accept: frozenset[int] = frozenset(),
        patience_s: float | None = None,
    ) -> None:
        self._options = options
        self._repeatable = repeatable
        self._accept = accept
        self._until = time.monotonic() + (patience_s or options.timeout_s)
        self._made = 0
        self.answer_lost = False  #: whether the server may have done a try whose answer did not arrive

    def pause_after(self, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds until the next try; None where the outcome is final."""
        asked = retry_after_of(outcome) if isinstance(outcome, httpx.Response) else None
        if self._is_being_answered(outcome) and time.monotonic() < self._until:
            return asked  # not counted: the server still works on an earlier try
        if not self._may_repeat(outcome) or self._made >= self._options.retries:
            return None
        self.answer_lost |= _may_be_done(outcome)
        pause = self._options.backoff_s * 2.0**self._made * random.uniform(0.75, 1.25)
        self._made += 1
        return min(max(pause, asked or 0.0), self._options.longest_pause_s)

    def _is_being_answered(self, outcome: httpx.Response | httpx.TransportError) -> bool:
        """Whether the server still works on an earlier try, with the same Idempotency-Key, whose answer was lost."""
        if not self.answer_lost or isinstance(outcome, httpx.TransportError):
            return False
        return outcome.status_code == 409 and retry_after_of(outcome) is not None

    def _may_repeat(self, outcome: httpx.Response | httpx.TransportError) -> bool:
        if isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout):
            return True  # nothing was sent, so nothing can happen twice
        if isinstance(outcome, httpx.TransportError):
            return self._repeatable and not isinstance(outcome, httpx.UnsupportedProtocol)
        return self._repeatable and outcome.status_code in _TRY_AGAIN - self._accept


def _may_be_done(outcome: httpx.Response | httpx.TransportError) -> bool:
    """Whether the server may have done what was asked, although its answer did not arrive."""
    if isinstance(outcome, httpx.TransportError):
        return not isinstance(outcome, httpx.ConnectError | httpx.ConnectTimeout)
    return outcome.status_code in _GATEWAYS


def retry_of(call: Call[Any], options: Options) -> Retry:
    """The retry state of a call that has not been sent yet."""
    return Retry(options, repeatable=call.repeatable, accept=call.accept, patience_s=call.timeout_s)


def read_answer(
    call: Call[Answer], options: Options, outcome: httpx.Response | httpx.TransportError, *, answer_lost: bool = False
) -> Answer:
    """Parse the answer of a call. `answer_lost`: the server may have done an earlier try.

    Raises UnreachableError for a transport error, ApiError for a problem, and ClientError for an answer that it can't read.
    """
    if isinstance(outcome, httpx.TransportError):
        raise not_reachable(options.api_url, outcome) from outcome
    deleted = answer_lost and call.method == "DELETE" and outcome.status_code == 404
    if outcome.status_code >= 400 and outcome.status_code not in call.accept and not deleted:
        raise ApiError.from_response(outcome)
    try:
        return call.parse(outcome)
    except ValueError as error:  # pydantic's and json's errors both are
        raise ClientError(
            f"{call.method} {call.path} answered something that this client cannot read.",
            hint=f"Is {options.api_url} a Nightpress API, and of a version near {VERSION}?",
        ) from error


def not_reachable(url: str, error: httpx.TransportError) -> UnreachableError:
    """The error that says why no answer came."""
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
        hint="Start a service with `nightpress up`, or name another with --api or NIGHTPRESS_API_URL. `nightpress doctor` looks for the cause.",
    )
