"""Requests to untrusted addresses. The connection goes to exactly the address that was checked.

The name is resolved once, and the connection uses that address. This prevents an attack by a name that resolves to another address
after the check (DNS rebinding). TLS still checks the certificate of the name. Redirects are not followed, the whole exchange may take
ten seconds, and at most 64 KiB of the answer are read.
"""

import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpcore

from nightpress.core.service.webhooks.targets import Target

DEADLINE_S = 10.0
MAX_ANSWER = 64 * 1024


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  #: by lower-case name
    body: bytes


def post(target: Target, headers: Mapping[str, str], body: bytes, *, context: ssl.SSLContext | None = None) -> Answer:
    """Send one POST to the address that was checked. Raises ConnectionError or TimeoutError."""
    deadline = time.monotonic() + DEADLINE_S
    backend = _Pinned(target.address, deadline)
    patience = dict.fromkeys(("connect", "read", "write", "pool"), DEADLINE_S)
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    try:
        with (
            httpcore.ConnectionPool(
                network_backend=backend, ssl_context=context or ssl.create_default_context(), max_connections=1
            ) as pool,
            pool.stream("POST", target.url, headers=sent, content=body, extensions={"timeout": patience}) as response,
        ):
            told = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            return Answer(response.status, told, _read(response.iter_stream()))
    except httpcore.TimeoutException as error:
        raise TimeoutError("it did not answer in ten seconds") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError, OSError) as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def _read(pieces: Iterable[bytes]) -> bytes:
    body = b""
    for piece in pieces:
        body += piece
        if len(body) >= MAX_ANSWER:
            break
    return body[:MAX_ANSWER]


class _Pinned(httpcore.NetworkBackend):
    """Connects to a fixed address, whatever the name in the URL."""

    def __init__(self, address: str, deadline: float) -> None:
        self._address = address
        self._deadline = deadline
        self._real = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - the name was resolved and checked before
        port: int,
        timeout: float | None = None,  # noqa: ARG002
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        left = max(0.001, self._deadline - time.monotonic())
        stream = self._real.connect_tcp(self._address, port, left, local_address, socket_options)
        return _Bounded(stream, self._deadline)


class _Bounded(httpcore.NetworkStream):
    """A stream with a deadline for the whole exchange, so that a slow receiver can't prolong it byte by byte."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def _seconds_left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, self._seconds_left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, self._seconds_left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        return _Bounded(self._stream.start_tls(ssl_context, server_hostname, self._seconds_left()), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
