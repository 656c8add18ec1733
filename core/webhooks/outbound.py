"""Requests to addresses that a stranger chose. Every address a name resolves to is checked, and the connection goes to the one that was checked.

Resolving once and connecting to that very address defeats a name that changes its mind in between (DNS rebinding); TLS still
checks the certificate of the name. Redirects are not followed, the whole exchange has ten seconds, and 64 KiB are read.
"""

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpcore

from core.errors import ErrorCode, NightpressError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], list[str]]

DEADLINE_S = 10.0
MAX_ANSWER = 64 * 1024
_PORTS = frozenset({443, 8443})
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


@dataclass(frozen=True)
class Target:
    """An address that may be reached, and where it was found."""

    url: str
    host: str
    port: int
    address: str


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]  #: by lower-case name
    body: bytes


def resolve_name(host: str, port: int) -> list[str]:
    """Every address of a name. Raises OSError where there is none."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def check_target(url: str, allowed: Sequence[Network] = (), *, resolve: Resolve = resolve_name) -> Target:
    """Raises NightpressError(url_not_allowed) unless every address of the URL is public, or in a network the operator allowed.

    Only in such networks may it be plain http, or a port other than 443 and 8443.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:  # a port or a name that is none
        raise _refused("it is not a web address") from error
    if parts.scheme not in {"http", "https"} or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise _refused("it is not a web address")
    if parts.username is not None or parts.password is not None:
        raise _refused("it holds a user name or password")
    try:
        addresses = [ipaddress.ip_address(one.partition("%")[0]) for one in resolve(host, port)]
    except (OSError, ValueError) as error:
        raise _refused(f"the name {host[:100]} has no address") from error
    known = [_within(one, allowed) for one in addresses]
    if not addresses or not all(mine or is_public(one) for mine, one in zip(known, addresses, strict=True)):
        raise _refused("it leads to a private or reserved address")
    if not all(known) and (parts.scheme != "https" or port not in _PORTS):
        raise _refused("it must be https, on port 443 or 8443")
    return Target(url, host, port, str(addresses[0]))


def is_public(address: Address) -> bool:
    """Whether an address is on the open internet, also where it is wrapped into an IPv6 one."""
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _NAT64):
            return False
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None and not is_public(inner):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def post(target: Target, headers: Mapping[str, str], body: bytes, *, context: ssl.SSLContext | None = None) -> Answer:
    """One request to the address that was checked. Raises ConnectionError or TimeoutError."""
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
    """Connects to one address, whatever the name."""

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
    """A stream that ends at a moment, however slowly bytes drip."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline has passed")
        return left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        return self._stream.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        self._stream.write(buffer, self._left())

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        return _Bounded(self._stream.start_tls(ssl_context, server_hostname, self._left()), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _refused(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.URL_NOT_ALLOWED,
        f"The address can't be used: {why}.",
        hint="Give an https address on the open internet, or ask the operator to add its network to NIGHTPRESS_WEBHOOK_NETWORKS.",
    )
