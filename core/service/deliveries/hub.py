"""Delivers to a repository of the Hugging Face Hub: one commit with the artifact, its report, its card and its signed statement.

The same requests as `huggingface_hub` makes for a commit: preupload, Git LFS batch and upload, commit. Files whose content the Hub has are
not sent again, and the commit names its parent: so a delivery that is repeated makes no second commit.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx

from nightpress.core.errors import NightpressError
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.service.deliveries.addresses import HubAddress
from nightpress.core.service.deliveries.exchange import Exchange, sent
from nightpress.core.service.deliveries.failures import refused, unavailable
from nightpress.core.service.deliveries.package import Item, Package, Progress
from nightpress.core.service.deliveries.stale import files_of_bundle
from nightpress.core.settings import Settings

_LFS = "application/vnd.git-lfs+json"
_AT_ONCE = 100
_FILES_AT_A_TIME = 4
_SAMPLE = 512
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)


class HubSender:
    """Commits to a branch, and makes repository (private) and branch where they are missing."""

    def __init__(self, address: HubAddress, secrets: dict[str, str], settings: Settings) -> None:
        self._repository = address.repository
        self._branch = address.branch
        self._endpoint = httpx.URL(settings.hub_endpoint.rstrip("/"))
        self._url = f"hf://{address.repository}@{address.branch}"
        self._authorization = {"Authorization": f"Bearer {secrets['token']}"}
        self._exchange = Exchange(self._url, settings)

    def close(self) -> None:
        self._exchange.close()

    def send(self, package: Package, progress: Progress) -> dict[str, Any]:
        head, present = self._head()
        before = self._files_before(head, present)
        stale = sorted((before & present.keys()) - {item.path for item in package.items})
        changed = [item for item in package.items if not _is_same(item, present.get(item.path))]
        for item in package.items:
            if item not in changed:
                progress.claim.skip(item.size)
        if not changed and not stale:
            return self._result(head, package)
        large = self._large(changed)
        self._upload([item for item in changed if item.path in large], progress)
        lines: list[dict[str, Any]] = [
            {
                "key": "header",
                "value": {
                    "summary": package.title[:200],
                    "description": f"Job {package.job_id}, delivery {package.delivery_id}.",
                    "parentCommit": head,
                },
            }
        ]
        lines += [_line(item, item.path in large) for item in changed]
        lines += [{"key": "deletedFile", "value": {"path": path}} for path in stale]
        progress.claim.note(sum(item.size for item in changed if item.path not in large))
        answer = self._api(
            "POST",
            f"commit/{quote(self._branch, safe='')}",
            content="".join(json.dumps(line) + "\n" for line in lines).encode(),
            headers={"Content-Type": "application/x-ndjson"},
        )
        try:
            return self._result(str(answer.json()["commitOid"]), package)
        except _MALFORMED as error:
            raise self._exchange.malformed(error) from error

    def _result(self, commit: str, package: Package) -> dict[str, Any]:
        page = f"{self._endpoint}/{self._repository}/tree/{quote(self._branch, safe='')}"
        return {"url": page, "commit": commit, "files": len(package.items), "bytes": package.size}

    def _head(self) -> tuple[str, dict[str, dict[str, Any]]]:
        """The branch's commit, and its files by path."""
        missing = frozenset({401, 404})
        for _ in range(3):
            answer = self._api("GET", f"revision/{quote(self._branch, safe='')}?blobs=true", accept=missing)
            if answer.status_code == 404 and answer.headers.get("x-error-code") == "RevisionNotFound":
                self._api("POST", f"branch/{quote(self._branch, safe='')}", json={}, accept=frozenset({409}))
            elif answer.status_code in missing:
                self._create(answer)
            else:
                try:
                    said = answer.json()
                    return str(said["sha"]), {str(entry["rfilename"]): entry for entry in said["siblings"]}
                except _MALFORMED as error:
                    raise self._exchange.malformed(error) from error
        raise unavailable(self._url, "the repository or branch that was made is not there yet")

    def _create(self, answer: httpx.Response) -> None:
        if answer.headers.get("x-error-code") not in {"RepoNotFound", None}:
            raise self._exchange.fault(answer)
        organisation, name = self._repository.split("/")
        body = {"name": name, "organization": organisation, "type": "model", "private": True}
        self._ask("POST", f"{self._endpoint}/api/repos/create", json=body, accept=frozenset({409}))

    def _files_before(self, head: str, present: dict[str, Any]) -> set[str]:
        if ATTESTATION_FILE not in present:
            return set()
        url = f"{self._endpoint}/{self._repository}/resolve/{head}/{ATTESTATION_FILE}"
        answer = self._ask("GET", url, accept=frozenset({302, 307, 404}))
        # A redirect means that somebody put the file into LFS: then it is not ours.
        return files_of_bundle(answer.content) if answer.is_success else set()

    def _large(self, items: Sequence[Item]) -> set[str]:
        """The paths that the Hub wants by LFS. Raises destination_refused if the repository ignores a file."""
        large = set()
        for begin in range(0, len(items), _AT_ONCE):
            files = [
                {"path": item.path, "sample": _text64(_first(item)), "size": item.size}
                for item in items[begin : begin + _AT_ONCE]
            ]
            answer = self._api("POST", f"preupload/{quote(self._branch, safe='')}", json={"files": files})
            try:
                for said in answer.json()["files"]:
                    if said["shouldIgnore"]:
                        raise refused(self._url, f"its .gitignore names {said['path']}", hint="Change that file.")
                    if said["uploadMode"] == "lfs":
                        large.add(str(said["path"]))
            except _MALFORMED as error:
                raise self._exchange.malformed(error) from error
        return large - {item.path for item in items if item.size == 0}  # LFS holds no empty files

    def _upload(self, items: Sequence[Item], progress: Progress) -> None:
        for begin in range(0, len(items), _AT_ONCE):
            some = {item.sha256: item for item in items[begin : begin + _AT_ONCE]}
            for item in items[begin : begin + _AT_ONCE]:
                if some[item.sha256] is not item:
                    progress.claim.skip(item.size)  # the same content under another name
            body = {
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "objects": [{"oid": item.sha256, "size": item.size} for item in some.values()],
                "hash_algo": "sha256",
                "ref": {"name": self._branch},
            }
            kind = {"Accept": _LFS, "Content-Type": _LFS}
            url = f"{self._endpoint}/{self._repository}.git/info/lfs/objects/batch"
            answer = self._ask("POST", url, content=json.dumps(body).encode(), headers=kind)
            try:
                actions = {str(said["oid"]): said for said in answer.json()["objects"]}
                with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
                    running = [
                        pool.submit(self._upload_item, item, actions[oid], progress) for oid, item in some.items()
                    ]
                for upload in running:
                    upload.result()
            except _MALFORMED as error:
                raise self._exchange.malformed(error) from error

    def _upload_item(self, item: Item, said: dict[str, Any], progress: Progress) -> None:
        if "error" in said:
            raise refused(self._url, f"{item.path}: {said['error'].get('message', 'an error')!s:.200}")
        actions = said.get("actions") or {}
        if "upload" not in actions:
            progress.claim.skip(item.size)  # the Hub has this content already
            return
        upload = actions["upload"]
        header = {str(name): str(value) for name, value in (upload.get("header") or {}).items()}
        if "chunk_size" in header:
            self._upload_parts(item, str(upload["href"]), header, progress)
        else:
            self._put(str(upload["href"]), item, 0, item.size, progress, header)
        if "verify" in actions:
            self._ask("POST", str(actions["verify"]["href"]), json={"oid": item.sha256, "size": item.size})

    def _upload_parts(self, item: Item, href: str, header: dict[str, str], progress: Progress) -> None:
        """Send a file in parts. What arrived in an earlier attempt isn't sent again while its upload is open."""
        kept = progress.of(item.path)
        if kept:
            href, header = str(kept["href"]), dict(kept["header"])
        etags: dict[str, str] = dict(kept.get("etags", {}))
        size = int(header["chunk_size"])
        count = -(-item.size // size)
        try:
            for number in range(1, count + 1):
                start, end = (number - 1) * size, min(number * size, item.size)
                if str(number) in etags:
                    progress.claim.skip(end - start)
                    continue
                url = next(url for name, url in header.items() if name.isdigit() and int(name) == number)
                etags[str(number)] = self._put(url, item, start, end, progress, {}).headers["etag"]
                progress.keep(item.path, {"href": href, "header": header, "etags": etags})
            parts = [{"partNumber": number, "etag": etags[str(number)]} for number in range(1, count + 1)]
            body = json.dumps({"oid": item.sha256, "parts": parts}).encode()
            self._ask("POST", href, content=body, headers={"Accept": _LFS, "Content-Type": _LFS})
        except NightpressError as error:
            if kept and not error.kind.retryable:  # the open upload has expired: the next attempt begins a new one
                progress.keep(item.path, {})
                raise unavailable(self._url, f"the open upload of {item.path} is no longer accepted") from error
            raise
        progress.keep(item.path, {})

    def _put(
        self, url: str, item: Item, start: int, end: int, progress: Progress, header: dict[str, str]
    ) -> httpx.Response:
        length = {"Content-Length": str(end - start)}
        return self._ask("PUT", url, content=sent(item, start, end, progress.claim), headers={**header, **length})

    def _api(self, method: str, path: str, **request: Any) -> httpx.Response:
        return self._ask(method, f"{self._endpoint}/api/models/{self._repository}/{path}", **request)

    def _ask(self, method: str, url: str, *, headers: dict[str, str] | None = None, **request: Any) -> httpx.Response:
        """Send a request. Only the Hub itself gets the token: uploads go to other hosts by URLs that are signed."""
        target = httpx.URL(url)
        own = (target.scheme, target.host, target.port) == (
            self._endpoint.scheme,
            self._endpoint.host,
            self._endpoint.port,
        )
        authorization = self._authorization if own else {}
        return self._exchange.ask(method, target, headers={**(headers or {}), **authorization}, **request)


def _is_same(item: Item, there: dict[str, Any] | None) -> bool:
    """Whether the Hub's file has the item's content: by LFS's SHA-256, or by Git's hash."""
    if there is None:
        return False
    lfs = there.get("lfs")
    if isinstance(lfs, dict):
        return lfs.get("sha256") == item.sha256
    if there.get("size", item.size) != item.size:
        return False
    data = item.content()
    return there.get("blobId") == hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


def _line(item: Item, large: bool) -> dict[str, Any]:
    if large:
        return {"key": "lfsFile", "value": {"path": item.path, "algo": "sha256", "oid": item.sha256, "size": item.size}}
    value = {"content": _text64(item.content()), "path": item.path, "encoding": "base64"}
    return {"key": "file", "value": value}


def _first(item: Item) -> bytes:
    return b"".join(item.read(0, min(_SAMPLE, item.size)))


def _text64(data: bytes) -> str:
    return base64.b64encode(data).decode()
