"""A small imitation of the Hugging Face Hub on a loopback port. It answers the API calls that are needed to read one commit, and to make one."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.hub_commits import CommitHandler, Writes

Files = dict[str, bytes]


@dataclass
class Hub:
    """The imitation's content and its record of requests. `repositories`: "models/org/name" → commit → files.

    Requests for large files are redirected to /cdn/, as on the real Hub.
    """

    repositories: dict[str, dict[str, Files]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    private: dict[str, str] = field(default_factory=dict)  #: repository → the token that it requires
    gated: set[str] = field(default_factory=set)
    #: for each of the next downloads: the number of bytes after which it breaks off
    breaks: list[int] = field(default_factory=list)
    elsewhere: str = ""  #: the redirect's target for large files, instead of /cdn/
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    sent: int = 0  #: bytes of all files and parts of files
    writes: Writes = field(default_factory=Writes)

    def push(self, repository: str, files: Files, branch: str = "main") -> str:
        """Add a commit to a branch. Returns the commit's hash."""
        listing = sorted((path, hashlib.sha256(data).hexdigest()) for path, data in files.items())
        commit = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.repositories.setdefault(repository, {})[commit] = files
        self.branches[repository, branch] = commit
        return commit

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@contextmanager
def serve_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(CommitHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((path, {key.lower(): value for key, value in self.headers.items()}))
            parts = path.strip("/").split("/")
            if parts[0] == "api" and parts[4] == "tree":
                self.list_tree("/".join(parts[1:4]), "/".join(parts[5:]))
            elif parts[0] == "api":
                self.describe("/".join(parts[1:4]), unquote("/".join(parts[5:])))
            elif parts[0] == "cdn":
                _, kind, organisation, name, commit, *rest = parts
                self.send_bytes(hub.repositories[f"{kind}/{organisation}/{name}"][commit]["/".join(rest)])
            else:
                kind = "datasets" if parts[0] == "datasets" else "models"
                organisation, name, _, commit, *rest = parts[kind == "datasets" :]
                self.resolve(f"{kind}/{organisation}/{name}", commit, "/".join(rest))

        def do_HEAD(self) -> None:  # noqa: N802
            """What `huggingface_hub` asks before it downloads a file."""
            organisation, name, _, commit, *rest = unquote(urlsplit(self.path).path).strip("/").split("/")
            data = hub.repositories[f"models/{organisation}/{name}"][commit]["/".join(rest)]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{git_hash(data)}"')
            self.end_headers()

        def describe(self, repository: str, revision: str) -> None:
            if not self.may_read(repository):
                return
            commit = hub.branches.get((repository, revision), revision)
            files = hub.repositories[repository].get(commit)
            if files is None:
                self.refuse(404, "RevisionNotFound")
                return
            siblings = [
                {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
                | (
                    {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
                    if large(path) or hub.writes.is_lfs(data)
                    else {}
                )
                for path, data in files.items()
            ]
            self.send_bytes(
                json.dumps({"id": repository.partition("/")[2], "sha": commit, "siblings": siblings}).encode()
            )

        def list_tree(self, repository: str, revision: str) -> None:
            commit = hub.branches.get((repository, revision), revision)
            files = [
                {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
                for path, data in hub.repositories[repository][commit].items()
            ]
            self.send_bytes(json.dumps(files).encode())

        def resolve(self, repository: str, commit: str, path: str) -> None:
            if not self.may_read(repository):
                return
            data = hub.repositories.get(repository, {}).get(commit, {}).get(path)
            if data is None:
                self.refuse(404, "EntryNotFound")
            elif large(path):
                self.send_response(302)
                self.send_header("Location", hub.elsewhere or f"/cdn/{repository}/{commit}/{path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self.send_bytes(data)

        def may_read(self, repository: str) -> bool:
            token = hub.private.get(repository)
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                self.refuse(401, "RepoNotFound")
            elif repository in hub.gated:
                self.refuse(403, "GatedRepo")
            elif repository not in hub.repositories:
                self.refuse(404, "RepoNotFound")
            else:
                return True
            return False

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_bytes(self, data: bytes) -> None:
            wanted = self.headers.get("Range")
            first, _, last = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
            rest = data[int(first) : int(last) + 1 if last else None]
            hub.sent += len(rest)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            if hub.breaks and len(rest) > hub.breaks[0]:
                self.wfile.write(rest[: hub.breaks.pop(0)])
                self.close_connection = True
                return
            self.wfile.write(rest)

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="hub under test")
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()


def large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))
