"""Finds the files of one split in a data set repository of the Hub, as the library `datasets` does: by the README, or by their names."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.yamlfile import read_yaml

README = "README.md"
_MAX_FRONT = 256 * 1024  #: characters of a README's front matter that are read
#: Words that name a split in a path.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_DATA = re.compile(r".*\.(parquet|(jsonl|csv|txt)(\.gz)?)")


def files_of_split(paths: Collection[str], readme: str | None, config: str | None, split: str) -> tuple[str, ...]:
    """The paths of a split's files, in order. config: None is the default. Raises NightpressError(not_found, unsupported_format)."""
    configs = _configs(readme)
    visible = sorted(path for path in paths if not any(part.startswith((".", "__")) for part in path.split("/")))
    if configs:
        found = _by_readme(configs, visible, config, split)
    else:
        data = [path for path in visible if _DATA.fullmatch(path) and (config is None or config in path.split("/"))]
        found = _by_name(data, split)
    data = [path for path in found if _DATA.fullmatch(path)]
    if found and not data:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"The split {split} is stored as {found[0][:200]}, which is not read here.",
            hint="Parquet, JSONL, CSV and text are. Most data sets have a Parquet form at the revision refs/convert/parquet: @refs%2Fconvert%2Fparquet.",
        )
    if not data:
        raise _no_split(split, _splits(visible, configs))
    kinds = {path.removesuffix(".gz").rpartition(".")[2] for path in data}
    if len(kinds) > 1:  # the same rows in several forms
        best = next(kind for kind in ("parquet", "jsonl", "csv", "txt") if kind in kinds)
        data = [path for path in data if path.removesuffix(".gz").endswith(f".{best}")]
    return tuple(data)


def _configs(readme: str | None) -> list[dict[str, Any]]:
    """The `configs` of a README's front matter that name their files; empty if there are none, or if it can't be read."""
    matched = re.match(r"---\r?\n(.*?)\r?\n---", readme or "", re.DOTALL)
    if matched is None:
        return []
    try:
        front = read_yaml(matched[1], max_characters=_MAX_FRONT)
    except NightpressError:
        return []
    configs = front.get("configs") if isinstance(front, dict) else None
    if not isinstance(configs, list):
        return []
    return [entry for entry in configs if isinstance(entry, dict) and entry.get("data_files")]


def _by_readme(configs: Sequence[dict[str, Any]], paths: Sequence[str], name: str | None, split: str) -> list[str]:
    chosen = next((entry for entry in configs if entry.get("config_name") == name), None)
    if chosen is None and name is not None:
        known = ", ".join(str(entry.get("config_name", "default")) for entry in configs)
        raise NightpressError(
            ErrorCode.NOT_FOUND,
            f"The data set has no configuration {name[:100]!r}; it has {known[:500]}.",
            hint="Name one: `?config=NAME`.",
        )
    if chosen is None:
        marked = [entry for entry in configs if entry.get("default") is True or entry.get("config_name") == "default"]
        chosen = (marked or list(configs))[0]
    patterns = _patterns(chosen["data_files"]).get(split, [])
    folder = str(chosen.get("data_dir") or "").strip("/")
    wanted = [re.compile(_expression(f"{folder}/{pattern}" if folder else pattern)) for pattern in patterns]
    return [path for path in paths if any(pattern.fullmatch(path) for pattern in wanted)]


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Split → patterns. `data_files` is a pattern, a list of them, or entries of a split and its `path`."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = (
            (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        )
        texts = paths if isinstance(paths, list) else [paths]
        found.setdefault(split, []).extend(text.removeprefix("./") for text in texts if isinstance(text, str))
    return found


def _expression(pattern: str) -> str:
    """A glob pattern as a regular expression: `*` stays within a folder, `**` doesn't."""
    out = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern[:500]):
        out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(part, re.escape(part))
    return out


def _by_name(paths: Sequence[str], split: str) -> list[str]:
    if split not in _WORDS:
        word = re.compile(rf"(^|[-._/ ]){re.escape(split)}([-._/ ]|$)")
        return [path for path in paths if word.search(path)]
    found = [path for path in paths if _named_split(path) == split]
    if not found and split == "train" and all(_named_split(path) is None for path in paths):
        return list(paths)  # no file names a split: all are for training
    return found


def _named_split(path: str) -> str | None:
    """The split that a path names: by the file, or else by a folder. A word of its own counts, as in data/train-00000-of-00002.parquet."""
    for part in reversed(path.split("/")):
        words = re.split(r"[^a-z]+", part.partition(".")[0].lower())
        for split, known in _WORDS.items():
            if not set(known).isdisjoint(words):
                return split
    return None


def _splits(paths: Sequence[str], configs: Sequence[dict[str, Any]]) -> list[str]:
    if configs:
        return sorted({split for entry in configs for split in _patterns(entry["data_files"])})
    return sorted({split for path in paths if _DATA.fullmatch(path) and (split := _named_split(path)) is not None})


def _no_split(split: str, known: Sequence[str]) -> NightpressError:
    there = (
        f"it has {', '.join(known)[:500]}"
        if known
        else "no file of it names a split, or is Parquet, JSONL, CSV or text"
    )
    return NightpressError(
        ErrorCode.NOT_FOUND,
        f"The data set has no split {split[:100]!r}; {there}.",
        hint="Name a split: `hf://datasets/organisation/name@main?split=train`. A single file can be named, too, by its path.",
    )
