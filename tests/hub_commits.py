"""The writing half of the Hub's imitation: repositories, branches, preupload, Git LFS by one request or by parts, and commits.

`huggingface_hub` itself uploads to it in tests/integration/test_deliver_hub.py, which shows that it speaks the same protocol.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from nightpress.core.ids import new_id

if TYPE_CHECKING:
    from tests.hub import Hub


@dataclass
class Writes:
    """What was written, and how the Hub behaves."""

    tokens: set[str] = field(default_factory=set)  #: that may write; empty: any
    lfs: dict[str, bytes] = field(default_factory=dict)  #: by SHA-256
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  #: open uploads, by their name
    chunk_size: int = 0  #: larger files are sent in parts of so many bytes; 0: none are
    commits: list[dict[str, Any]] = field(default_factory=list)  #: headers of commits, oldest first
    received: int = 0  #: bytes of uploads
    #: called with the path of each request that writes; an answer of True breaks the connection
    interrupt: Any = None
    uploads_at: str = ""  #: the address of the host that takes uploads; empty: the Hub itself
    lose_answer: bool = False  #: break the connection after the next commit

    def is_lfs(self, data: bytes) -> bool:
        return hashlib.sha256(data).hexdigest() in self.lfs


class CommitHandler(BaseHTTPRequestHandler):
    hub: "Hub"

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.body()
        if self.interrupted(path):
            return
        parts = path.split("/")
        if path == "api/validate-yaml":  # asked by huggingface_hub
            self.answer(200, {"errors": [], "warnings": []})
        elif parts[0] == "lfs":
            self.lfs(parts[1], "/".join(parts[2:]), body)
        elif not self.may_write():
            self.answer(401, {"error": "Invalid credentials"}, code="RepoNotFound")
        elif path == "api/repos/create":
            said = json.loads(body)
            self.create(f"models/{said['organization']}/{said['name']}")
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        else:
            repository, action, name = "/".join(parts[1:4]), parts[4], "/".join(parts[5:])
            if repository not in self.hub.repositories:
                self.answer(404, {"error": "Repository not found"}, code="RepoNotFound")
            elif action == "branch":
                self.hub.branches.setdefault((repository, name), self.hub.branches[repository, "main"])
                self.answer(200, {})
            elif (repository, name) not in self.hub.branches:
                self.answer(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
            elif action == "preupload":
                self.preupload(json.loads(body))
            elif action == "commit":
                self.commit(repository, name, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.hub.asked.append((path, {key.lower(): value for key, value in self.headers.items()}))
        if self.interrupted(path):
            return
        body = self.body()
        self.hub.writes.received += len(body)
        _, kind, name, *rest = path.split("/")
        if kind == "part":
            if name not in self.hub.writes.parts:
                self.answer(403, {"error": "expired"})
                return
            self.hub.writes.parts[name][int(rest[0])] = body
            self.answer(200, {}, etag=f'"{hashlib.md5(body).hexdigest()}"')
        elif hashlib.sha256(body).hexdigest() == name:
            self.hub.writes.lfs[name] = body
            self.answer(200, {})
        else:
            self.answer(400, {"error": "wrong bytes"})

    def lfs(self, action: str, name: str, raw: bytes) -> None:
        said = json.loads(raw)
        if action == "verify":
            found = self.hub.writes.lfs.get(said["oid"])
            self.answer(200 if found is not None and len(found) == said["size"] else 404, {})
            return
        parts = self.hub.writes.parts.get(name)
        if parts is None:
            self.answer(403, {"error": "expired"})
            return
        wanted = [f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"' for part in said["parts"]]
        whole = b"".join(parts[number] for number in sorted(parts))
        if wanted != [part["etag"] for part in said["parts"]] or hashlib.sha256(whole).hexdigest() != said["oid"]:
            self.answer(400, {"error": "wrong parts"})
            return
        del self.hub.writes.parts[name]
        self.hub.writes.lfs[said["oid"]] = whole
        self.answer(200, {})

    def create(self, repository: str) -> None:
        if repository in self.hub.repositories:
            self.answer(409, {"error": "You already created this model repo"})
            return
        self.hub.push(repository, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.hub.url}/{repository}"})

    def preupload(self, said: dict[str, Any]) -> None:
        files = []
        for file in said["files"]:
            sample = base64.b64decode(file["sample"])
            text = (
                file["size"] < 10_000_000
                and b"\0" not in sample
                and not file["path"].endswith((".safetensors", ".onnx"))
            )
            files.append(
                {"path": file["path"], "uploadMode": "regular" if text else "lfs", "shouldIgnore": False, "oid": None}
            )
        self.answer(200, {"files": files})

    def batch(self, said: dict[str, Any]) -> None:
        writes, objects = self.hub.writes, []
        host = writes.uploads_at or self.hub.url
        for wanted in said["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in writes.lfs:
                upload: dict[str, Any] = {"href": f"{host}/lfs/{'complete' if self.in_parts(size) else 'whole'}/{oid}"}
                if self.in_parts(size):
                    name = new_id("upl")
                    writes.parts[name] = {}
                    count = -(-size // writes.chunk_size)
                    numbered = {str(n): f"{host}/lfs/part/{name}/{n}" for n in range(1, count + 1)}
                    upload = {
                        "href": f"{host}/lfs/complete/{name}",
                        "header": {"chunk_size": str(writes.chunk_size), **numbered},
                    }
                found["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(found)
        kind = "multipart" if "multipart" in said["transfers"] else "basic"
        self.answer(200, {"transfer": kind, "objects": objects})

    def in_parts(self, size: int) -> bool:
        return bool(self.hub.writes.chunk_size) and size > self.hub.writes.chunk_size

    def commit(self, repository: str, branch: str, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        header = lines[0]["value"]
        head = hub.branches[repository, branch]
        if header.get("parentCommit") not in {None, head}:
            self.answer(412, {"error": "A commit has happened since"})
            return
        files = dict(hub.repositories[repository][head])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.writes.lfs:
                    self.answer(400, {"error": "LFS pointer pointed to a file that does not exist"})
                    return
                files[value["path"]] = hub.writes.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = hub.push(repository, files, branch)
        hub.writes.commits.append({**header, "branch": branch, "oid": commit})
        if hub.writes.lose_answer:
            hub.writes.lose_answer = False
            self.close_connection = True
            self.connection.close()
            return
        url = f"{hub.url}/{repository}/commit/{commit}"
        self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def may_write(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return not self.hub.writes.tokens or token in self.hub.writes.tokens

    def interrupted(self, path: str) -> bool:
        if self.hub.writes.interrupt is not None and self.hub.writes.interrupt(path):
            self.close_connection = True
            self.connection.close()
            return True
        return False

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, tree: dict[str, Any], *, code: str = "", etag: str = "") -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(data)
