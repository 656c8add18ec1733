"""Models and data sets on the wire, and how their files are sent."""

import datetime as dt
from typing import Any, Literal

from pydantic import (
    Field,
)

from nightpress.core.recipes.models import Name
from nightpress.core.wire.base import Request, Sha256, View


def upload_part_size(size: int) -> int:
    """Bytes of every part but the last of a file that is uploaded. Server and clients must agree on it."""
    return max(64 * 1024**2, -(-size // 10_000 // 1024**2) * 1024**2)


class FileAnnouncement(Request):
    """A file that will be uploaded, in parts of `upload_part_size(size)` bytes.

    `part_sha256` lets the server sign each part's content, so that damage is found at the part and not at the end.
    """

    path: str = Field(min_length=1, max_length=512, examples=["model.safetensors"])
    size: int = Field(ge=0)
    sha256: Sha256
    part_sha256: list[Sha256] = Field(default_factory=list, max_length=10_000)


class ModelCreate(Request):
    """Exactly one of `files` (an upload follows), `path` (a folder the operator allowed) and `source` (fetched from there).

    The folder may hold more than the model: what the model doesn't need is not taken, and the answer names it under `left_out`.
    A source is `s3://bucket/folder`, or `hf://organisation/name@revision`, where the revision is a branch, tag or commit.
    An adapter of peft (LoRA) is brought in the same ways. It is merged into `base` whenever a job reads it.
    """

    name: Name
    files: list[FileAnnouncement] = Field(default_factory=list, max_length=2000)
    path: str | None = Field(None, max_length=4096, examples=["/srv/models/all-minilm-l6-v2"])
    source: str | None = Field(None, min_length=1, max_length=1024, examples=["s3://models/released/minilm"])
    #: Of an adapter: the id or name of a registered model, or an address, which is fetched if it isn't registered. If it is left out,
    #: `base_model_name_or_path` of the adapter's config says which.
    base: str | None = Field(None, min_length=1, max_length=1024, examples=["llama-3-8b"])


class DataSetCreate(Request):
    """One file: `.txt` (prose) or `.jsonl` (rows with `text` and, for classifiers, `label`), plain or `.gz`.

    A source is `s3://bucket/folder/file.jsonl`, `hf://datasets/organisation/name@revision/folder/file.jsonl`, or a split of a repository:
    `hf://datasets/organisation/name@revision?split=train&columns=text:sentence,label`. `config` names a configuration.
    """

    name: Name
    file: FileAnnouncement | None = None
    path: str | None = Field(None, max_length=4096)
    source: str | None = Field(None, min_length=1, max_length=1024, examples=["s3://data/reviews.jsonl.gz"])


class UploadPart(View):
    """One request that the client must make: `PUT url` with exactly `size` bytes from `offset` of the file, and these headers."""

    number: int
    offset: int
    size: int
    url: str
    headers: dict[str, str] = {}


class UploadFile(View):
    path: str
    size: int
    parts: list[UploadPart]  #: those not yet received; URLs live 15 minutes, ask again for fresh ones


class FileView(View):
    path: str
    size: int
    sha256: str


RegistryState = Literal["uploading", "fetching", "verifying", "ready", "failed"]


class ModelView(View):
    """`fetching` and `verifying` go on by themselves, to `ready` or, with an `error`, to `failed`."""

    id: str
    name: str
    state: RegistryState
    digest: str | None
    size: int
    source: Literal["upload", "path", "s3", "hub"]
    source_url: str | None = None
    revision: str | None = None  #: of the source: a commit, or a digest of what its bucket listed
    progress: float | None = None  #: 0 to 1, while it is fetched or verified
    architecture: str | None
    model_type: str | None
    task: str | None
    parameters: int | None
    files: list[FileView]
    base_id: str | None = None  #: of an adapter: the model that it is merged into. `files` are the adapter's own
    #: names beside the model that are not needed and were never opened; `name/` is a folder
    left_out: list[str] = []
    error: dict[str, Any] | None = None
    created_at: dt.datetime
    uploads: list[UploadFile] = []  #: only in the answers to create and to GET …/uploads


class DataSetView(View):
    id: str
    name: str
    state: RegistryState
    digest: str | None
    size: int
    source: Literal["upload", "path", "s3", "hub", "builtin"]
    source_url: str | None = None
    revision: str | None = None
    progress: float | None = None
    rows: int | None
    labelled: bool | None
    error: dict[str, Any] | None = None
    created_at: dt.datetime | None
    uploads: list[UploadFile] = []
