"""Requests of a delivery to an HTTP service, with its errors in the project's terms."""

from collections.abc import Iterator
from typing import Any

import httpx

from nightpress.core.errors import NightpressError
from nightpress.core.service.claims import Claim
from nightpress.core.service.deliveries.failures import refused, unavailable
from nightpress.core.service.deliveries.guarded import guarded_client
from nightpress.core.service.deliveries.package import Item
from nightpress.core.settings import Settings

_PIECE = 1024**2
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_MAX_ANSWER = 16 * 1024**2
#: statuses that pass by themselves
_LATER = {408, 409, 412, 425, 429}


class Exchange:
    """Sends requests to one service, and to the addresses that it names, as far as the operator's rules allow."""

    def __init__(self, where: str, settings: Settings) -> None:
        self._where = where
        self._client = guarded_client(settings.destination_networks, timeout=_TIMEOUT)
        self._client.headers["User-Agent"] = "nightpress"

    def close(self) -> None:
        self._client.close()

    def ask(
        self, method: str, url: httpx.URL | str, *, accept: frozenset[int] = frozenset(), **request: Any
    ) -> httpx.Response:
        """Send a request and read its answer. `accept`: statuses ≥ 300 that are answers and not errors.

        Raises NightpressError: destination_unavailable (try again), destination_refused.
        """
        try:
            with self._client.stream(method, url, **request) as response:
                response_body = _bounded(response)
                if response_body is None:
                    raise unavailable(self._where, "its answer is too long")
        except httpx.InvalidURL as error:
            raise unavailable(self._where, f"it names an address that is not valid ({error})") from error
        except httpx.TransportError as error:
            raise unavailable(self._where, str(error).rstrip(".") or type(error).__name__) from error
        answer = httpx.Response(
            response.status_code,
            headers=_without_encoding(response.headers),
            content=response_body,
            request=response.request,
        )
        if answer.is_success or answer.status_code in accept:
            return answer
        raise self.fault(answer)

    def fault(self, answer: httpx.Response) -> NightpressError:
        """The error for an answer that is none."""
        said = answer.text[:200].replace("\n", " ").strip()
        why = f"it answered {answer.status_code}" + (f" ({said})" if said.isprintable() and said else "")
        status = answer.status_code
        if status in _LATER or status >= 500 or status < 400:
            return unavailable(self._where, why)
        return refused(self._where, why)

    def malformed(self, error: Exception) -> NightpressError:
        return unavailable(self._where, f"its answer can't be understood ({type(error).__name__})")


def sent(item: Item, start: int, end: int, claim: Claim) -> Iterator[bytes]:
    """The bytes [start, end) of a file as the body of a request, counted. It breaks off if the claim is lost."""
    for piece in _pieces(item, start, end):
        yield piece
        claim.note(len(piece))


def sent_whole(item: Item, start: int, end: int, claim: Claim) -> Iterator[bytes]:
    """As `sent`, but to the end even if the claim is lost: some services forget an upload whose request breaks off."""
    for piece in _pieces(item, start, end):
        yield piece
        claim.count(len(piece))


def _pieces(item: Item, start: int, end: int) -> Iterator[bytes]:
    for stored in item.read(start, end) if end > start else ():
        for begin in range(0, len(stored), _PIECE):
            yield stored[begin : begin + _PIECE]


def _bounded(response: httpx.Response) -> bytes | None:
    body = b""
    for piece in response.iter_bytes():
        body += piece
        if len(body) > _MAX_ANSWER:
            return None
    return body


def _without_encoding(headers: httpx.Headers) -> httpx.Headers:
    """The headers of a body that was decoded."""
    return httpx.Headers([(name, value) for name, value in headers.multi_items() if name.lower() != "content-encoding"])
