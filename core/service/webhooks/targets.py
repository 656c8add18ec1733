"""Checks the target of a webhook: every address that its name resolves to is checked, and one of them is used."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.outbound import Network, Resolve, is_public, is_within, resolve_name

PORTS = frozenset({443, 8443})


@dataclass(frozen=True)
class Target:
    """A URL that was checked, and one address of its host."""

    url: str
    host: str
    port: int
    address: str


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
    known = [is_within(address, allowed) for address in addresses]
    if not addresses or not all(mine or is_public(address) for mine, address in zip(known, addresses, strict=True)):
        raise _refused("it leads to a private or reserved address")
    if not all(known) and (parts.scheme != "https" or port not in PORTS):
        raise _refused("it must be https, on port 443 or 8443")
    return Target(url, host, port, str(addresses[0]))


def _refused(why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.URL_NOT_ALLOWED,
        f"The address can't be used: {why}.",
        hint="Give an https address on the open internet, or ask the operator to add its network to NIGHTPRESS_WEBHOOK_NETWORKS.",
    )
