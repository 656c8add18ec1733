"""An HTTP client that connects only to addresses that this service may connect to for a tenant.

A name is resolved once for each request, and the connection uses an address that was checked. This prevents an attack by a name that
resolves to another address after the check (DNS rebinding). TLS still checks the certificate of the name.
"""

import ipaddress
from collections.abc import Sequence

import httpx

from nightpress.core.outbound import Network, Resolve, is_public, is_within, resolve_name


def guarded_client(
    networks: Sequence[Network], *, timeout: httpx.Timeout, resolve: Resolve = resolve_name
) -> httpx.Client:
    """A client that connects only to public addresses by https, and to those in `networks` also by http. It follows no redirects.

    Its requests raise httpx.ConnectError for another address, and what httpx raises.
    """
    # No proxy and no .netrc of the environment: the check would hold for the proxy instead of the target.
    return httpx.Client(
        transport=_GuardedTransport(networks, resolve), timeout=timeout, trust_env=False, follow_redirects=False
    )


class _GuardedTransport(httpx.BaseTransport):
    """Checks the address of each request, and sends the request to exactly that address."""

    def __init__(self, networks: Sequence[Network], resolve: Resolve) -> None:
        self._networks = networks
        self._resolve = resolve
        #: one for each name, so that no connection whose certificate was checked for one name serves another
        self._transports: dict[str, httpx.HTTPTransport] = {}
        self._context = httpx.create_ssl_context()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        address = self._checked(url, request)
        transport = self._transports.setdefault(url.host, httpx.HTTPTransport(verify=self._context))
        # The Host header is set already. TLS asks for the name and checks its certificate.
        pinned = httpx.Request(
            request.method,
            url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": url.host},
        )
        return transport.handle_request(pinned)

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()

    def _checked(self, url: httpx.URL, request: httpx.Request) -> str:
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            addresses = [ipaddress.ip_address(text.partition("%")[0]) for text in self._resolve(url.host, port)]
        except (OSError, ValueError) as error:
            raise httpx.ConnectError(f"the name {url.host[:100]} has no address", request=request) from error
        known = [is_within(address, self._networks) for address in addresses]
        if not addresses or not all(mine or is_public(address) for mine, address in zip(known, addresses, strict=True)):
            raise httpx.ConnectError(f"{url.host[:100]} leads to a private or reserved address", request=request)
        if not all(known) and url.scheme != "https":
            raise httpx.ConnectError(f"{url.host[:100]} must be reached by https", request=request)
        return str(addresses[0])
