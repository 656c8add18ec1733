"""Parses the addresses of destinations and checks that the operator allows them. Nothing here uses the network.

An address may hold `{model}`, `{job}` and `{artifact}`, which are filled in for each delivery.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.settings import Settings

MAX_LENGTH = 1024
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY_PART = re.compile(r"[A-Za-z0-9!_.*'()@=+,-]{1,255}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?(:[0-9]{1,5})?")
_REGISTRY_PART = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
#: as long as what is filled in later, so that an address that was checked does not become too long
_LONGEST_JOB, _LONGEST_ARTIFACT = f"job_{'0' * 26}", "compressed-tensors"
_FIELD = re.compile(r"\{([a-z]*)\}")


@dataclass(frozen=True)
class BucketAddress:
    bucket: str
    key: str  #: the folder; "": the whole bucket

    @property
    def parts(self) -> tuple[str, ...]:
        return ("s3", self.bucket, *(part for part in self.key.split("/") if part))


@dataclass(frozen=True)
class HubAddress:
    repository: str  #: organisation/name
    branch: str

    @property
    def parts(self) -> tuple[str, ...]:
        # The Hub takes names in any case for the same repository.
        return ("hf", *self.repository.casefold().split("/"))


@dataclass(frozen=True)
class RegistryAddress:
    host: str  #: with its port, if it has one
    name: str
    tag: str

    @property
    def parts(self) -> tuple[str, ...]:
        return ("oci", self.host.lower(), *self.name.split("/"))


Address = BucketAddress | HubAddress | RegistryAddress


def fill(template: str, *, model: str, job: str, artifact: str) -> str:
    """The address of one delivery. Raises NightpressError(invalid_request) for an unknown field."""
    values = {"model": model, "job": job, "artifact": artifact}

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise _invalid(template, f"it has the field {match[0]}; there are {{model}}, {{job}} and {{artifact}}")
        return values[match[1]]

    filled = _FIELD.sub(value, template)
    # A registry takes names in lower case only, while models and formats may have capitals.
    return filled if not filled.startswith("oci://") else _lower_name(filled)


def parse_destination(raw: str, settings: Settings) -> Address:
    """Parse an s3://, hf:// or oci:// address.

    Raises NightpressError: invalid_request if it is malformed, path_not_allowed if the operator did not allow it.
    """
    address = _parse(raw)
    mine = address.parts
    if not any(_holds(prefix_parts(prefix), mine) for prefix in settings.destinations):
        raise NightpressError(
            ErrorCode.PATH_NOT_ALLOWED,
            f"{raw[:300]} is not below a prefix that the operator allowed for results.",
            hint="Ask the operator to add one to NIGHTPRESS_DESTINATIONS.",
        )
    # The service's own storage holds all tenants' data. No destination may be in it, or contain it.
    if settings.objects_url.startswith("s3://"):
        own = prefix_parts(settings.objects_url)
        if _holds(own, mine) or _holds(mine, own):
            raise NightpressError(
                ErrorCode.PATH_NOT_ALLOWED,
                f"{raw[:300]} is in the service's own storage.",
                hint="Name another bucket or folder.",
            )
    return address


def check_destinations(templates: Sequence[str], settings: Settings, *, model: str, exports: int = 1) -> None:
    """Check the destinations of a job before it runs. exports: the number of artifacts that its recipe names.

    Raises NightpressError: invalid_request, path_not_allowed.
    """
    for template in templates:
        parse_destination(fill(template, model=model, job=_LONGEST_JOB, artifact=_LONGEST_ARTIFACT), settings)
        if exports > 1 and "{artifact}" not in template:
            raise _invalid(
                template, "the recipe makes several artifacts, and all would go there; write {artifact} in it"
            )


def prefix_parts(prefix: str) -> tuple[str, ...]:
    """A prefix of addresses in whole parts: scheme, bucket or organisation or host, and what follows."""
    scheme, separator, rest = prefix.partition("://")
    parts = tuple(part for part in rest.split("/") if part)
    if not separator or scheme not in {"s3", "hf", "oci"} or not parts:
        raise _invalid(
            prefix, "a prefix is e.g. s3://bucket/folder, hf://organisation or oci://registry.example.com/team"
        )
    if scheme == "hf":
        parts = tuple(part.casefold() for part in parts)
    if scheme == "oci":
        parts = (parts[0].lower(), *parts[1:])
    return (scheme, *parts)


def longest_prefix(prefixes: Sequence[str], address: Address) -> str | None:
    """The prefix with the most parts of those that hold an address."""
    fitting = [prefix for prefix in prefixes if _holds(prefix_parts(prefix), address.parts)]
    return max(fitting, key=lambda prefix: len(prefix_parts(prefix)), default=None)


def _parse(raw: str) -> Address:
    if not raw.isprintable() or len(raw) > MAX_LENGTH:
        raise _invalid(raw, "it is too long, or holds characters that can't be shown")
    if raw.startswith("s3://"):
        bucket, _, key = raw.removeprefix("s3://").removesuffix("/").partition("/")
        parts = key.split("/") if key else []
        if not _BUCKET.fullmatch(bucket) or not all(
            _KEY_PART.fullmatch(part) and part not in {".", ".."} for part in parts
        ):
            raise _invalid(raw, "it is not s3://bucket/folder")
        return BucketAddress(bucket, key)
    if raw.startswith("hf://"):
        repository, _, branch = raw.removeprefix("hf://").partition("@")
        parts = repository.split("/")
        named = len(parts) == 2 and all(
            _HUB_NAME.fullmatch(part) and not {"..", "--"} & {part[i : i + 2] for i in range(len(part))}
            for part in parts
        )
        branch = branch or "main"
        if not named or not _BRANCH.fullmatch(branch) or ".." in branch or branch.endswith(("/", ".lock")):
            raise _invalid(raw, "it is not hf://organisation/name@branch")
        return HubAddress(repository, branch)
    if raw.startswith("oci://"):
        host, _, rest = raw.removeprefix("oci://").partition("/")
        name, _, tag = rest.partition(":")
        tag = tag or "latest"
        if (
            not _HOST.fullmatch(host)
            or not all(map(_REGISTRY_PART.fullmatch, name.split("/")))
            or not _TAG.fullmatch(tag)
        ):
            raise _invalid(raw, "it is not oci://registry/name:tag with a name in lower case")
        return RegistryAddress(host, name, tag)
    raise _invalid(raw, "it begins with none of s3://, hf:// and oci://")


def _lower_name(url: str) -> str:
    head, separator, tag = url.removeprefix("oci://").rpartition(":")
    if not separator or "/" in tag:
        return url.lower()
    return f"oci://{head.lower()}:{tag}"


def _holds(outer: tuple[str, ...], inner: tuple[str, ...]) -> bool:
    """Whether `inner` is `outer` or lies below it. Parts are compared whole."""
    return inner[: len(outer)] == outer


def _invalid(raw: str, why: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_REQUEST,
        f"{raw[:200]!r} is not a destination: {why}.",
        hint="E.g. s3://bucket/{model}/{job}, hf://organisation/name@main or oci://registry.example.com/team/name:tag.",
    )
