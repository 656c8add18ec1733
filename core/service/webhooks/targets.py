"""Checks the target of a webhook: every address that its name resolves to is checked, and one of them is used."""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from nightpress.core.errors import ErrorCode, NightpressError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], list[str]]

PORTS = frozenset({443, 8443})
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


@dataclass(frozen=True)
class Target:
    """A URL that was checked, and one address of its host."""

    url: str
    host: str
    port: int
    address: str


def resolve_name(host: str, port: int) -> list[str]:
    """Every address of a name. Raises OSError if there is none."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def check_target(url: str, allowed: Sequence[Network] = (), *, resolve: Resolve = resolve_name) -> Target:
    """Check a webhook's URL: every address of its host must be public, or in one of the networks `allowed` by the operator.

    Plain http, and ports other than 443 and 8443, are allowed only within those networks. Raises NightpressError(url_not_allowed).
    """
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        host = (parts.hostname or "").encode("idna").decode()
    except ValueError as error:  # an invalid port or name
        raise _refused("it is not a web address") from error
    if parts.scheme not in {"http", "https"} or not host or not url.isascii() or not url.isprintable() or " " in url:
        raise _refused("it is not a web address")
    if parts.username is not None or parts.password is not None:
        raise _refused("it holds a user name or password")
    try:
        addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in resolve(host, port)]
    except (OSError, ValueError) as error:
        raise _refused(f"the name {host[:100]} has no address") from error
    known = [_within(address, allowed) for address in addresses]
    if not addresses or not all(mine or is_public(address) for mine, address in zip(known, addresses, strict=True)):
        raise _refused("it leads to a private or reserved address")
    if not all(known) and (parts.scheme != "https" or port not in PORTS):
        raise _refused("it must be https, on port 443 or 8443")
    return Target(url, host, port, str(addresses[0]))


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet. An IPv4 address that is embedded in an IPv6 address must be public too."""
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in network for network in _NAT64):
            return False
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is not None and not is_public(inner):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _within(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _refused(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.URL_NOT_ALLOWED,
        f"The address can't be used: {why}.",
        hint="Give an https address on the open internet, or ask the operator to add its network to NIGHTPRESS_WEBHOOK_NETWORKS.",
    )
