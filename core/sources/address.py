"""Parses the address of a source and checks that the operator allows it. Nothing here uses the network."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

Kind = Literal["models", "datasets"]
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


@dataclass(frozen=True)
class BucketAddress:
    """A folder of a bucket, or, for a data set, one object in it."""

    kind: Kind
    bucket: str
    key: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.key}".rstrip("/")


@dataclass(frozen=True)
class HubAddress:
    """A repository of the Hugging Face Hub at a branch, tag or commit, or one file in it."""

    kind: Kind
    repository: str  #: organisation/name
    revision: str
    path: str = ""

    @property
    def url(self) -> str:
        kind = "datasets/" if self.kind == "datasets" else ""
        return f"hf://{kind}{self.repository}@{self.revision}/{self.path}".rstrip("/")


Address = BucketAddress | HubAddress


def parse_address(raw: str, kind: Kind, settings: Settings) -> Address:
    """Parse an s3:// or hf:// address of a source.

    Raises NightpressError: invalid_request if it is malformed, path_not_allowed if the operator did not allow it.
    """
    if not raw.isprintable():
        raise _invalid(raw, "it holds characters that can't be shown")
    if raw.startswith("s3://"):
        return _allowed_bucket(_bucket(raw, kind), settings)
    if raw.startswith("hf://"):
        return _allowed_hub(_hub(raw, kind), settings)
    raise _invalid(raw, "it begins with neither s3:// nor hf://")


def check_source(raw: str, settings: Settings) -> None:
    """Check a model's source: an address, or an absolute server path. Raises what `parse_address` and `resolve_path` raise."""
    if raw.startswith("/"):
        resolve_path(raw, settings)
    else:
        parse_address(raw, "models", settings)


def resolve_path(raw: str, settings: Settings) -> Path:
    """A server path with its symbolic links resolved. Raises path_not_allowed outside the operator's roots, whether or not it exists."""
    try:
        path = Path(raw).resolve()
        allowed = Path(raw).is_absolute() and any(path.is_relative_to(root.resolve()) for root in settings.model_roots)
    except (OSError, ValueError, RuntimeError):  # e.g. a link to itself, or a NUL in the path
        allowed = False
    if not allowed:
        raise NightpressError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{raw[:300]!r} is not below a folder that the operator allowed.",
            hint="Upload the files, or ask the operator to add their folder to NIGHTPRESS_MODEL_ROOTS.",
        )
    return path


def _bucket(raw: str, kind: Kind) -> BucketAddress:
    bucket, _, key = raw.removeprefix("s3://").partition("/")
    key = key.removesuffix("/")
    if not _BUCKET.fullmatch(bucket):
        raise _invalid(raw, "its bucket has no valid name")
    if key and any(part in {"", ".", ".."} for part in key.split("/")):
        raise _invalid(raw, "its key is not a plain path")
    if kind == "datasets" and not key:
        raise _invalid(raw, "a data set is one file, and none is named")
    return BucketAddress(kind, bucket, key)


def _hub(raw: str, kind: Kind) -> HubAddress:
    rest = raw.removeprefix("hf://")
    if (kind == "datasets") != rest.startswith("datasets/"):
        raise _invalid(raw, "a model is hf://organisation/name@revision, a data set's file hf://datasets/…")
    organisation, _, rest = rest.removeprefix("datasets/").partition("/")
    if "@" in rest:
        name, _, rest = rest.partition("@")
        revision, _, path = rest.partition("/")
    else:
        (name, _, path), revision = rest.partition("/"), "main"
    revision = revision.replace("%2F", "/")  # the Hub writes a branch with a slash in its name in this way
    named = all(_HUB_NAME.fullmatch(part) and ".." not in part and "--" not in part for part in (organisation, name))
    if not named or not _REVISION.fullmatch(revision) or ".." in revision or revision.endswith("/"):
        raise _invalid(raw, "it is not organisation/name@revision")
    if (kind == "models" and path) or (kind == "datasets" and any(part in {"", ".", ".."} for part in path.split("/"))):
        raise _invalid(raw, "a model is a whole repository, a data set one file of one")
    return HubAddress(kind, f"{organisation}/{name}", revision, path)


def _allowed_bucket(address: BucketAddress, settings: Settings) -> BucketAddress:
    inside = any(_holds(_parts(prefix), _parts(address.url)) for prefix in settings.source_prefixes)
    # The service's own storage holds the tenants' data. No source may be in it, even if an allowed prefix contains it.
    own = _parts(settings.objects_url) if settings.objects_url.startswith("s3://") else None
    mine = _parts(address.url)
    if not inside or (own is not None and (_holds(own, mine) or _holds(mine, own))):
        raise NightpressError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{address.url[:300]} is not in a bucket or folder that the operator allowed.",
            hint="Upload the files, or ask the operator to add their folder to NIGHTPRESS_SOURCE_PREFIXES.",
        )
    return address


def _allowed_hub(address: HubAddress, settings: Settings) -> HubAddress:
    organisation = address.repository.partition("/")[0].casefold()
    if organisation not in {allowed.casefold() for allowed in settings.hub_organisations}:
        raise NightpressError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{address.repository} is not of an organisation that the operator allowed.",
            hint="Upload the files, or ask the operator to add the organisation to NIGHTPRESS_HUB_ORGANISATIONS.",
        )
    return address


def _parts(url: str) -> tuple[str, ...]:
    parts = urlsplit(url)
    return (parts.netloc, *(part for part in parts.path.split("/") if part))


def _holds(outer: tuple[str, ...], inner: tuple[str, ...]) -> bool:
    """Whether `inner` is the folder `outer` or lies in it. Names are compared whole."""
    return inner[: len(outer)] == outer


def _invalid(raw: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_REQUEST,
        f"{raw[:200]!r} is not a source: {why}.",
        hint="E.g. s3://bucket/folder or hf://organisation/name@main.",
    )
