"""Checks the names of a folder's files: which files belong to a model, which are refused, and what else the folder may be."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Set
from pathlib import PurePosixPath

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.jsonfile import malformed

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"

_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja", ".md"})
_NAMES = frozenset({"LICENSE", "LICENCE", "NOTICE", "README"})
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".p", ".ckpt", ".joblib", ".npy", ".npz", ".dill"})
_FOREIGN = {
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".tflite": "TensorFlow Lite",
    ".ot": "Rust",
}
_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst"})

_ADAPTER = re.compile(r"adapter_(config\.json|model\.(safetensors|bin|pt))")
_MAKERS_OWN = re.compile(
    r"consolidated([.-]\d[\w.-]*)?\.safetensors"
)  #: weights under Mistral's and Meta's own parameter names
_MODULE = re.compile(r"\d+_\w+")  #: a folder of sentence-transformers, e.g. 2_Dense

_SHOWN = 20  #: number of problems that an error names
_HINTS = 4  #: number of hints that an error contains

_MERGE = (
    "Merge it into the model that it was trained for, on your own machine: "
    "`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)` of peft, "
    "or the `AutoPeftModelFor…` of its task; save the tokenizer there too. Then bring new_folder."
)
_UNPICKLE = (
    "Convert it on your own machine, where you trust it: "
    "`AutoModel….from_pretrained(folder).save_pretrained(new_folder)` of transformers writes safetensors. Then bring new_folder."
)
_GRAPH = "Bring the model that it was exported from, as `save_pretrained` wrote it. Nightpress writes {0} itself: name `{1}` in a recipe's `exports`."
_OTHER_FRAMEWORK = "Load it with transformers 4, which still reads {0}, and `save_pretrained` it as safetensors. Then bring that folder."
_ALONE = {
    ".gguf": "Its weights were written for llama.cpp, most often quantized. " + _GRAPH.format("GGUF", "gguf"),
    ".onnx": "A finished graph is not pressed. " + _GRAPH.format("ONNX", "onnx"),
    ".xml": "A finished graph is not pressed. " + _GRAPH.format("OpenVINO", "openvino"),
    ".h5": _OTHER_FRAMEWORK.format("TensorFlow"),
    ".msgpack": _OTHER_FRAMEWORK.format("Flax"),
}


def is_model_file(path: str) -> bool:
    """Return whether a file of this name may be part of a model."""
    pure = PurePosixPath(path)
    return pure.suffix in _SUFFIXES or pure.name in _NAMES


def choose_files(paths: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    """Select the model's files from a folder that may hold more: one set of weights, and the other files that a model may have.

    read: returns a file's bytes; called only for the index. If no set of weights is found, for example in an adapter, returns all paths:
    then `check_names` raises the error that says what the folder is. Raises NightpressError(malformed_model) if the index names shards
    that are missing.
    """
    taken = [path for path in paths if is_model_file(path)]
    named = _named_in(read(INDEX_FILE)) if INDEX_FILE in taken else set()
    raise_all(missing_shards(named, taken))
    if named:
        weights = named
    elif WEIGHTS_FILE in taken:
        weights = {WEIGHTS_FILE}
    else:
        weights = {path for path in taken if "/" not in path}
    chosen = [path for path in taken if path in weights or not path.endswith(".safetensors")]
    if any(path.endswith(".safetensors") for path in chosen):
        return chosen
    return list(paths)


def check_names(paths: Collection[str]) -> None:
    """Check a model by the names of its files, before any file is sent. Raises NightpressError with all problems at once."""
    if (error := _other_kind(paths)) is not None:
        raise error
    raise_all([*_name_errors(paths), *_beside(paths)])


def missing_shards(named: Set[str], present: Collection[str]) -> Iterable[NightpressError]:
    """Yield an error for each shard that the index names and that is not present."""
    missing = sorted(named - set(present))
    if missing and WEIGHTS_FILE in present:
        shown = ", ".join(path[:100] for path in missing[:_SHOWN])
        hint = (
            f"If {WEIGHTS_FILE} is the whole model, delete {INDEX_FILE}; else bring the shards, and not {WEIGHTS_FILE}."
        )
        what = f"{INDEX_FILE} is stale: it names {shown}, which is not there, and {WEIGHTS_FILE} lies beside it."
        yield NightpressError(ErrorCode.MALFORMED_MODEL, what, hint=hint, file=INDEX_FILE)
        return
    for path in missing:
        yield NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"{INDEX_FILE}: it names {path[:200]}, which is not there.",
            hint="Fetch the missing shards, or save the model again into an empty folder: an index and its shards belong together.",
            file=INDEX_FILE,
            shard=path[:200],
        )


def raise_all(errors: Iterable[NightpressError]) -> None:
    """Raise the errors, if there are any: a single error as it is, several as one error that names all of them."""
    found = list(errors)
    if len(found) == 1:
        raise found[0]
    if not found:
        return
    shown = found[:_SHOWN]
    files = [str(error.details.get("shard") or error.details.get("file", ""))[:100] for error in shown]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise NightpressError(
        found[0].code,
        f"{found[0].message} In all, {len(found)} things are wrong with the model's files: see {', '.join(dict.fromkeys(files))}{more}.",
        hint=" ".join(list(dict.fromkeys(error.hint for error in found))[:_HINTS]),
        file=files[0],
        faults=[{"at": file, "problem": error.message[:300]} for file, error in zip(files, shown, strict=True)],
    )


def _name_errors(paths: Collection[str]) -> Iterable[NightpressError]:
    seen: dict[str, str] = {}
    for path in paths:
        pure = PurePosixPath(path)
        if str(pure) != path or pure.is_absolute() or ".." in pure.parts or "\\" in path or not path.isprintable():
            yield malformed(path[:200], "its name is not a plain relative path")
            continue
        twin = seen.setdefault(path.casefold(), path)
        if twin != path:
            yield malformed(path, f"its name differs from {twin} by case alone")
        if _ADAPTER.fullmatch(path):
            continue
        if not is_model_file(path):
            yield _unsupported_file(path)
        elif pure.suffix == ".safetensors" and len(pure.parts) > 1:
            yield _weights_below(path)


def _beside(paths: Collection[str]) -> Iterable[NightpressError]:
    """Yield errors for files beside a model's weights that would change the model (adapters), or that hold the weights a second time."""
    adapter = sorted(path for path in paths if _ADAPTER.fullmatch(path))
    if adapter:
        yield _refused(
            adapter[0],
            f"{' and '.join(adapter)} belong to an adapter (LoRA) beside the model: whoever loads the folder gets both.",
            f"Take {' and '.join(adapter)} out to press the model alone. To press both: {_MERGE}",
        )
    for path in paths:
        if _MAKERS_OWN.fullmatch(path):
            yield _refused(
                path,
                f"{path} holds the weights once more, under the names of their maker's own programs.",
                f"Leave it out: the model is read from {WEIGHTS_FILE} or its shards.",
            )


def _other_kind(paths: Collection[str]) -> NightpressError | None:
    """Return an error that says what a folder without a Transformer's safetensors is; None: it may be a model."""
    names = set(paths)
    if "model_index.json" in names:
        return _refused(
            "model_index.json",
            "The folder is a pipeline of diffusers: several models, each in a sub-folder.",
            "Nightpress presses one Transformer at a time: bring the sub-folder that holds it, such as text_encoder, with the tokenizer's files.",
        )
    if {WEIGHTS_FILE, INDEX_FILE} & names:
        return None
    if any(_ADAPTER.fullmatch(path) for path in names):
        return _refused(
            min(path for path in names if _ADAPTER.fullmatch(path)),
            "The folder is an adapter (LoRA) without the model that it adapts.",
            _MERGE,
        )
    top = sorted(path for path in names if path.endswith(".safetensors") and "/" not in path)
    if top and all(_MAKERS_OWN.fullmatch(path) for path in top):
        return _refused(
            top[0],
            "The folder holds weights under the names of their maker's own programs, which transformers doesn't read.",
            f"Bring the same model as transformers saves it, with config.json and {WEIGHTS_FILE} or its shards: "
            "most repositories hold both; else convert it with the script of transformers for its family.",
        )
    return None if top else _without_safetensors(names)


def _without_safetensors(names: set[str]) -> NightpressError | None:
    by_suffix = {PurePosixPath(path).suffix.lower(): path for path in sorted(names, reverse=True)}
    for suffix, hint in _ALONE.items():
        if suffix in by_suffix:
            what = _FOREIGN.get(suffix, "OpenVINO")
            return _refused(
                by_suffix[suffix], f"The folder holds {what} weights and no safetensors: {by_suffix[suffix]}.", hint
            )
    pickles = [path for path in sorted(names) if PurePosixPath(path).suffix.lower() in _PICKLES]
    if not pickles:
        return None
    shown = ", ".join(path[:100] for path in pickles[:_SHOWN])
    return _refused(
        pickles[0],
        f"The folder holds weights as pickles, or formats that may hold one, and no safetensors: {shown}. Opening a pickle can run any program.",
        _UNPICKLE,
    )


def _unsupported_file(path: str) -> NightpressError:
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _PICKLES:
        what = f"{path} is a pickle, or a format that may hold one: opening it can run any program."
        hint = f"Leave it out if the model doesn't need it. {_UNPICKLE}"
    elif suffix in _FOREIGN:
        what = f"{path} holds {_FOREIGN[suffix]} weights; models come here as safetensors."
        hint = "Leave it out, or load it with transformers and `save_pretrained` it as safetensors."
    elif suffix in _ARCHIVES:
        what = f"{path} is an archive; archives are not opened here."
        hint = "Unpack it and bring the files."
    else:
        what = f"{path} is not a kind of file that a model has here."
        hint = f"Leave it out. Taken are {', '.join(sorted(_SUFFIXES))} and {', '.join(sorted(_NAMES))}."
    return _refused(path, what, hint)


def _weights_below(path: str) -> NightpressError:
    folder = PurePosixPath(path).parts[0]
    if _MODULE.fullmatch(folder):
        return _refused(
            path,
            f"{path} holds the weights of a module of sentence-transformers, which comes after the transformer and is not pressed.",
            f"Press the transformer alone: leave {folder} out, take its entry out of modules.json, "
            "and apply the module to the artifact's vectors where you use them.",
        )
    return _refused(
        path,
        f"{path} holds weights in a sub-folder.",
        f"Weights lie at the top of the folder: one model a folder. Leave {folder} out, or bring it as a model of its own.",
    )


def _refused(path: str, what: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.UNSUPPORTED_FORMAT, what, hint=hint, file=path)


def _named_in(index: bytes) -> set[str]:
    try:
        return {str(name) for name in json.loads(index)["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()
