"""Reads one commit of a repository of the Hugging Face Hub, with few requests to its HTTP API.

Requests go only to the configured endpoint and to the domains that it may redirect downloads to. The token is sent only to the endpoint.
"""

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import httpx

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings
from nightpress.core.sources.address import HubAddress
from nightpress.core.sources.source import Listing, RemoteFile, refused, unavailable

_PIECE = 1024**2
_HOPS = 5
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_MAX_LISTING = 64 * 1024**2


class HubSource:
    """A source on the Hub. Its revision is the commit to which the branch or tag points now; every file is read at that commit."""

    def __init__(self, address: HubAddress, settings: Settings) -> None:
        self._address = address
        self._endpoint = httpx.URL(settings.hub_endpoint.rstrip("/"))
        self._domains = tuple(domain.lower().strip(".") for domain in settings.hub_download_domains)
        self._token = settings.hub_token.get_secret_value() if settings.hub_token else None
        self._folder, _, self._name = address.path.rpartition("/")
        self._client = httpx.Client(
            timeout=_TIMEOUT, headers={"User-Agent": "nightpress", "Accept-Encoding": "identity"}
        )

    def close(self) -> None:
        self._client.close()

    def listing(self) -> Listing:
        address = self._address
        url = f"{self._endpoint}/api/{address.kind}/{address.repository}/revision/{quote(address.revision, safe='')}"
        with self._get(url + "?blobs=true") as response:
            raw = b""
            for piece in response.iter_bytes(_PIECE):
                raw += piece
                if len(raw) > _MAX_LISTING:
                    raise unavailable(address.url, "its list of files is too long")
        try:
            said = httpx.Response(200, content=raw).json()
            commit = str(said["sha"])
            files = [_file(entry, commit) for entry in said["siblings"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise unavailable(address.url, "the Hub's answer can't be understood") from error
        if address.path:
            files = [replace(file, path=self._name) for file in files if file.path == address.path]
        if not files:
            raise NightpressError(
                ErrorCode.NOT_FOUND, f"There is no file {address.url}.", hint="Is it spelled so, with its folder?"
            )
        return Listing(commit, tuple(files))

    def read(self, file: RemoteFile, start: int, end: int | None = None) -> Generator[bytes]:
        """As all sources do. end: where to stop; None is the file's end."""
        kind = "datasets/" if self._address.kind == "datasets" else ""
        path = quote(f"{self._folder}/{file.path}".lstrip("/"), safe="/")
        url = f"{self._endpoint}/{kind}{self._address.repository}/resolve/{file.version}/{path}"
        part = f"bytes={start}-{'' if end is None else end - 1}"
        is_part = start > 0 or end is not None
        with self._get(url, {"Range": part} if is_part else {}) as response:
            if is_part and response.status_code != 206:
                raise unavailable(file.path, "the Hub does not go on in the middle of a file")
            # Not in pieces of a fixed size: an incomplete piece would be lost when the connection breaks.
            yield from response.iter_raw()

    @contextlib.contextmanager
    def _get(self, url: str, headers: dict[str, str] | None = None) -> Iterator[httpx.Response]:
        """Send a GET request. Each redirect is checked against the allowed domains before it is followed."""
        target = httpx.URL(url)
        try:
            for _ in range(_HOPS):
                own = self._is_endpoint(target)
                authorization = {"Authorization": f"Bearer {self._token}"} if own and self._token else {}
                with self._client.stream("GET", target, headers={**(headers or {}), **authorization}) as response:
                    if response.next_request is None:
                        self._check(response)
                        yield response
                        return
                    target = response.next_request.url
                if not self._is_endpoint(target) and not self._is_allowed(target):
                    raise refused(self._address.url, f"It leads on to {target.host}, which is not allowed here.")
            raise unavailable(self._address.url, "it leads round in circles")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise unavailable(self._address.url, str(error) or type(error).__name__) from error

    def _is_endpoint(self, url: httpx.URL) -> bool:
        return (url.scheme, url.host, url.port) == (self._endpoint.scheme, self._endpoint.host, self._endpoint.port)

    def _is_allowed(self, url: httpx.URL) -> bool:
        host = url.host.lower()
        known = any(host == domain or host.endswith(f".{domain}") for domain in self._domains)
        return known and url.scheme == "https" and url.port is None and not url.userinfo

    def _check(self, response: httpx.Response) -> None:
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if status < 300:
            return
        what = self._address.url
        if code == "GatedRepo":
            raise refused(what, "Accept its terms on the Hub, and ask the operator to set NIGHTPRESS_HUB_TOKEN.")
        if status in {401, 403}:
            raise refused(
                what, "It is not there, or private: then NIGHTPRESS_HUB_TOKEN must be a token that may read it."
            )
        if status == 404:
            lacking = "revision" if code == "RevisionNotFound" else "repository or file"
            raise NightpressError(ErrorCode.NOT_FOUND, f"There is no such {lacking}: {what}.", hint="Is it spelled so?")
        raise unavailable(what, f"the Hub answered {status}")


def _file(said: dict[str, Any], commit: str) -> RemoteFile:
    sha256 = (said.get("lfs") or {}).get("sha256")
    return RemoteFile(str(said["rfilename"]), int(said["size"]), commit, str(sha256) if sha256 else None)
