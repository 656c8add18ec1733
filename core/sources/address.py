"""Parses the address of a source and checks that the operator allows it. Nothing here uses the network."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlencode, urlsplit

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

Kind = Literal["models", "datasets"]
#: Columns of a split that are taken if nobody names others: those that every data set here may have.
DEFAULT_COLUMNS = {name: name for name in ("text", "messages", "tools", "label", "slice")}
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
class SplitChoice:
    """Which rows and columns of a data set repository are wanted."""

    split: str
    config: str | None  #: None is the default
    columns: Mapping[str, str]  #: name here → name in the repository

    def missing(self, there: Collection[str]) -> list[str]:
        """Which columns a file lacks: of named ones each, and else a text or a conversation."""
        if self.columns != DEFAULT_COLUMNS:
            return [stored for stored in self.columns.values() if stored not in there]
        return [] if {"text", "messages"} & set(there) else ["text", "messages"]


@dataclass(frozen=True)
class HubAddress:
    """A repository of the Hugging Face Hub at a branch, tag or commit; one file in it; or one split of a data set."""

    kind: Kind
    repository: str  #: organisation/name
    revision: str
    path: str = ""
    choice: SplitChoice | None = None

    @property
    def url(self) -> str:
        kind = "datasets/" if self.kind == "datasets" else ""
        return f"hf://{kind}{self.repository}@{self.revision}/{self.path}".rstrip("/") + self._query()

    def _query(self) -> str:
        if self.choice is None:
            return ""
        given = {"config": self.choice.config, "split": self.choice.split}
        if self.choice.columns != DEFAULT_COLUMNS:
            given["columns"] = ",".join(
                name if name == stored else f"{name}:{stored}" for name, stored in self.choice.columns.items()
            )
        return "?" + urlencode({key: value for key, value in given.items() if value is not None}, safe=":,")


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


def is_split(address: Address) -> bool:
    """Return whether an address means a split of a data set, and not a file or folder."""
    return isinstance(address, HubAddress) and address.choice is not None


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
    rest, _, query = raw.removeprefix("hf://").partition("?")
    if (kind == "datasets") != rest.startswith("datasets/"):
        raise _invalid(raw, "a model is hf://organisation/name@revision, a data set hf://datasets/…")
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
    if (kind == "models" and (path or query)) or (
        path and (query or any(part in {"", ".", ".."} for part in path.split("/")))
    ):
        raise _invalid(raw, "a model is a whole repository, a data set one file of one, or one split: …?split=train")
    choice = _choice(raw, query) if kind == "datasets" and not path else None
    return HubAddress(kind, f"{organisation}/{name}", revision, path, choice)


def _choice(raw: str, query: str) -> SplitChoice:
    try:
        given = parse_qs(query, keep_blank_values=True, strict_parsing=True, max_num_fields=3) if query else {}
    except ValueError:
        raise _invalid(raw, "what follows its `?` is not name=value, joined by `&`") from None
    if not given.keys() <= {"config", "split", "columns"} or any(
        len(values) > 1 or not values[0] for values in given.values()
    ):
        raise _invalid(raw, "behind its `?` are `split`, `config` and `columns`, each once")
    columns = {}
    for entry in given["columns"][0].split(",") if "columns" in given else ():
        name, _, stored = entry.partition(":")
        if not re.fullmatch(r"\w{1,64}", name) or name in columns:
            raise _invalid(raw, "its `columns` are not like text:sentence,label")
        columns[name] = stored or name
    if len(set(columns.values())) < len(columns):
        raise _invalid(raw, "its `columns` take one column twice")
    config = given.get("config", [None])[0]
    return SplitChoice(given.get("split", ["train"])[0], config, columns or DEFAULT_COLUMNS)


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
