"""How an embedder pools its token vectors into one vector. Read from `modules.json` and the pooling module that it names.

The result is a field of the model's header. All code that pools uses this field: evaluation, passes that rank layers or train, and GGUF.
"""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.jsonfile import malformed, parse_json

MODULES_FILE = "modules.json"
_UNLISTED = "1_Pooling/config.json"  #: place of the pooling module in folders without `modules.json`
#: Key that sentence-transformers wrote before 2026 → its name of the pooling mode, in the order in which it joins several modes.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
#: Modules that don't change a vector's direction. The figures of embedders depend only on the direction.
_HARMLESS = frozenset({"Transformer", "Normalize", "Dropout"})

Read = Callable[[str], Any]  #: path in the folder → the parsed JSON file; None: there is no such file


def module_folders(read: Callable[[str], bytes | None]) -> list[str]:
    """Return the sub-folders that hold a model's modules of sentence-transformers. `read` returns None for a file that does not exist."""
    raw = read(MODULES_FILE)
    if raw is None:
        return [PurePosixPath(_UNLISTED).parts[0]]
    modules = parse_json(MODULES_FILE, raw)
    paths = (
        [str(module.get("path", "")) for module in modules if isinstance(module, dict)]
        if isinstance(modules, list)
        else []
    )
    plain = [
        path for path in paths if path and not path.startswith(("/", ".")) and ".." not in PurePosixPath(path).parts
    ]
    return list(dict.fromkeys(plain))


def read_pooling(read: Read) -> str:
    """Return the pooling mode, e.g. `mean`, or `cls+max` if several vectors are joined; `mean` if the folder names none.

    Raises NightpressError: unsupported_architecture for a module that changes the vectors and can't be pressed or measured here;
    malformed_model for invalid files.
    """
    modules = read(MODULES_FILE)
    if modules is None:
        return _modes(_UNLISTED, read(_UNLISTED) or {})
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise malformed(MODULES_FILE, "it is no list of modules")
    found: list[str] = []
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if kind == "Pooling":
            file = f"{path}/config.json" if path else "config.json"
            config = read(file)
            if config is None:
                raise malformed(MODULES_FILE, f"it names a pooling module in {path[:200]}, which has no config.json")
            found.append(_modes(file, config))
            if config.get("include_prompt") is False:
                raise _unsupported("Pooling (include_prompt: false)", path)
        elif kind not in _HARMLESS:
            raise _unsupported(kind, path)
    if len(found) != 1:
        raise malformed(MODULES_FILE, f"it names {len(found)} pooling modules, where an embedder has one")
    return found[0]


def _modes(file: str, config: Any) -> str:
    if not isinstance(config, dict):
        raise malformed(file, "it is not a JSON object")
    said = config.get("pooling_mode")
    if said is None:
        said = [mode for flag, mode in POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
    modes = said if isinstance(said, list) else [said]
    for mode in modes:
        if mode not in POOLING_FLAGS.values():
            raise malformed(
                file, f"it has the pooling mode {str(mode)[:40]!r}; known are {', '.join(POOLING_FLAGS.values())}"
            )
    if not modes:
        raise malformed(file, "its list of pooling modes is empty")
    return "+".join(modes)


def _unsupported(kind: str, path: str) -> NightpressError:
    return NightpressError(
        ErrorCode.UNSUPPORTED_ARCHITECTURE,
        f"{MODULES_FILE} names a module {kind[:60]!r} in {path[:200]!r}: it changes the vectors, and is neither pressed nor measured here.",
        hint=f"Press the transformer alone: take that module out of {MODULES_FILE}, and apply it to the artifact's vectors where you use them.",
        file=MODULES_FILE,
    )
