"""`out/manifest.json`: the files of each artifact, with sizes and SHA-256. It is written last: without it an attempt has no result."""

import hashlib
import os
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MANIFEST_FILE = "manifest.json"
ATTESTATION_FILE = "nightpress.sigstore.json"  #: the signed statement in an artifact's folder


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _plain(path: str) -> str:
    pure = PurePosixPath(path)
    if (
        not pure.parts
        or pure.is_absolute()
        or ".." in pure.parts
        or str(pure) != path
        or "\\" in path
        or not path.isprintable()
    ):
        raise ValueError(f"{path!r} is not a plain relative path")
    return path


#: A relative POSIX path without `..`.
RelativePath = Annotated[str, Field(min_length=1, max_length=512), AfterValidator(_plain)]


class FileEntry(_Model):
    """One file."""

    path: RelativePath
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class ArtifactEntry(_Model):
    """One exported form of the pressed model: a folder below out/."""

    format: str  #: e.g. "onnx", "openvino", "compressed-tensors", "safetensors"
    path: RelativePath  #: folder below out/, e.g. "onnx"
    files: tuple[FileEntry, ...]  #: paths relative to `path`
    consumer: str  #: library and version that loaded it in the verification, e.g. "onnxruntime 1.32.0"

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        return digest_of(self.files)


class Manifest(_Model):
    schema_version: Literal[1] = 1
    job_id: str
    attempt: int
    verdict: Literal["accepted", "rejected"]
    artifacts: tuple[ArtifactEntry, ...]
    report: tuple[FileEntry, ...]  #: report.json, report.md, report.html, relative to out/


def digest_of(files: tuple[FileEntry, ...] | list[FileEntry]) -> str:
    """Return `sha256:` and the hash of the sorted lines `<sha256>  <path>`. The order of `files` does not change the digest."""
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def describe_file(root: Path, path: Path) -> FileEntry:
    """Hash a file below `root`. The entry's path is relative to `root`."""
    with path.open("rb") as stream:
        return describe_stream(path.relative_to(root).as_posix(), stream)


def describe_stream(name: str, stream: BufferedReader) -> FileEntry:
    """Hash an open file. The entry's path is `name`."""
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(path=name, size=os.fstat(stream.fileno()).st_size, sha256=digest)


def describe_folder(root: Path) -> tuple[FileEntry, ...]:
    """Hash every regular file below `root`, sorted by path."""
    return tuple(describe_file(root, path) for path in sorted(root.rglob("*")) if path.is_file())


def describe_bytes(name: str, data: bytes) -> FileEntry:
    """The entry of a file with these bytes."""
    return FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
