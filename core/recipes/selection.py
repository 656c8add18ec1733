"""Selects a model's files from a folder as it lies. One rule for local folders, server paths, uploads, buckets and the Hub.

A Hub snapshot holds graphs, other frameworks' weights, programs, images and hidden files beside the model. What the model needs is selected;
everything else is never opened, and its name is told.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.adapters import adapter_files
from nightpress.core.recipes.filenames import INDEX_FILE, WEIGHTS_FILE, is_model_file, missing_shards, raise_all
from nightpress.core.recipes.jsonfile import JsonBudget, malformed, parse_json
from nightpress.core.recipes.other_kinds import adapter_beside, is_adapter_file, is_makers_own, other_kind
from nightpress.core.recipes.pooling import MODULES_FILE, module_folders

_TEMPLATES = "additional_chat_templates"  #: transformers keeps a model's further chat templates in this folder
#: What trainers and other programs write beside a model.
_TRAINERS = frozenset(
    {
        "all_results.json",
        "eval_results.json",
        "params.json",
        "test_results.json",
        "train_results.json",
        "trainer_state.json",
    }
)
_SHOWN = 100  #: number of names in the note of what was left out

#: Returns the bytes of a small file.
Read = Callable[[str], bytes]


@dataclass(frozen=True)
class Selection:
    """A model's files, and what lies beside them."""

    files: tuple[str, ...]
    left_out: tuple[str, ...]  #: never opened; `name/` is a whole folder


def select_files(paths: Collection[str], read: Read | None) -> Selection:
    """Select the model's files.

    paths: relative to the folder; `name/` is a folder that was not looked into. read: None if the files are not here yet, as in an announced
    upload: then all weights at the top are selected, and all that may describe modules. Raises NightpressError: unsupported_format if the
    folder is another kind of thing, malformed_model for names that no file may have, and for shards that the index names and that are missing.
    """
    raise_all(_not_relative(paths))
    raise_all(
        _linked(path[:-1]) for path in paths if path.endswith("/") and path.count("/") == 1 and is_model_file(path)
    )
    present = {path for path in paths if not path.endswith("/") and not _is_hidden(path)}
    if (error := other_kind(present)) is not None:
        raise error
    top = {path for path in present if "/" not in path and is_model_file(path) and path not in _TRAINERS}
    weights = _weights(present, top, read)
    others = {path for path in top if not path.endswith(".safetensors")}
    others |= _below(paths, present, top, read)
    # Names that somebody announces are all checked; a folder that somebody found may have others beside the model.
    raise_all(_flawed(paths if read is None else weights | others))
    if (error := adapter_beside(present)) is not None:
        raise error
    files = tuple(sorted(weights | others))
    return Selection(files, _summary(set(paths) - set(files), files))


def select_adapter(paths: Collection[str]) -> Selection:
    """Select an adapter's files: its own, and those of its tokenizer. Raises NightpressError(unsupported_format, malformed_model)."""
    raise_all(_not_relative(paths))
    files = adapter_files(paths)
    return Selection(files, _summary(set(paths) - set(files), files))


def _weights(present: Collection[str], top: Collection[str], read: Read | None) -> set[str]:
    found = {path for path in top if path.endswith(".safetensors") and not is_makers_own(path)}
    named = _named_in(read(INDEX_FILE)) if read is not None and INDEX_FILE in top else set()
    raise_all(
        malformed(INDEX_FILE, f"it names {path[:200]}, which is no safetensors file")
        for path in sorted(named)
        if not path.endswith(".safetensors")
    )
    raise_all(missing_shards(named, present))
    raise_all(_below_the_top(path) for path in sorted(named) if "/" in path)
    if named:
        return named
    if read is not None and WEIGHTS_FILE in found:
        return {WEIGHTS_FILE}
    return {path for path in found if not is_adapter_file(path)}


def _below(paths: Collection[str], present: Iterable[str], top: Collection[str], read: Read | None) -> set[str]:
    """The files in the folders of an embedder's modules and of further chat templates. Weights of modules are refused."""
    if read is None:
        below = [path for path in present if path.count("/") == 1 and is_model_file(path)]
        return {path for path in below if not path.endswith(".safetensors")}
    folders = module_folders(lambda path: read(path) if path in top else None)
    linked = [folder for folder in (*folders, _TEMPLATES) if f"{folder}/" in paths]
    raise_all(_linked(folder) for folder in linked)
    found = {
        path for path in present if str(PurePosixPath(path).parent) in {*folders, _TEMPLATES} and is_model_file(path)
    }
    raise_all(_of_a_module(path) for path in sorted(found - set(top)) if path.endswith(".safetensors"))
    return {path for path in found if "/" in path}


def _not_relative(paths: Iterable[str]) -> Iterable[NightpressError]:
    for path in paths:
        pure = PurePosixPath(path)
        if str(pure) != path.removesuffix("/") or pure.is_absolute() or ".." in pure.parts:
            yield malformed(path[:200], "its name is not a plain relative path")


def _flawed(files: Collection[str]) -> Iterable[NightpressError]:
    seen: dict[str, str] = {}
    for path in sorted(files):
        if "\\" in path or not path.isprintable():
            yield malformed(path[:200], "its name is not a plain relative path")
        twin = seen.setdefault(path.casefold(), path)
        if twin != path:
            yield malformed(path, f"its name differs from {twin} by case alone")


def _summary(left: Collection[str], files: Collection[str]) -> tuple[str, ...]:
    """The names that are left out, sorted. A folder of which nothing is selected is one entry."""
    used = {path.partition("/")[0] for path in files if "/" in path}
    names = sorted({_plain(path if _top(path) in used else _top(path) + "/" * ("/" in path)) for path in left})
    more = len(names) - _SHOWN
    return tuple(names) if more <= 0 else (*names[:_SHOWN], f"… and {more} more")


def _plain(name: str) -> str:
    """A name that a terminal and a database can take."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)[:200]


def _top(path: str) -> str:
    return path.partition("/")[0]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _linked(folder: str) -> NightpressError:
    return NightpressError(
        ErrorCode.PATH_NOT_ALLOWED,
        f"{folder} is a link to a folder, or was not looked into.",
        hint="Copy the folder with its links resolved, e.g. with `cp -rL`.",
        file=folder,
    )


def _below_the_top(path: str) -> NightpressError:
    return _refused(
        path,
        f"{path} holds weights in a sub-folder, and {INDEX_FILE} names them.",
        "Weights lie at the top of the folder: move the shards there, and write their names so in the index.",
    )


def _of_a_module(path: str) -> NightpressError:
    folder = _top(path)
    return _refused(
        path,
        f"{path} holds the weights of a module of sentence-transformers, which comes after the transformer and is not pressed.",
        f"Press the transformer alone: leave {folder} out, take its entry out of {MODULES_FILE}, "
        "and apply the module to the artifact's vectors where you use them.",
    )


def _refused(path: str, what: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.UNSUPPORTED_FORMAT, what, hint=hint, file=path)


def _named_in(index: bytes) -> set[str]:
    """The shards that the index names; empty if it is no index, which `inspect_model` reports."""
    JsonBudget().take(INDEX_FILE, index)
    parsed = parse_json(INDEX_FILE, index)
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    return set(names) if all(isinstance(name, str) for name in names) else set()
