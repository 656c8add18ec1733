"""Recognises folders that are no model in safetensors, by the names of their files, and says what to do with each kind."""

import re
from collections.abc import Collection
from pathlib import PurePosixPath

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.filenames import INDEX_FILE, WEIGHTS_FILE

_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".p", ".ckpt", ".joblib", ".npy", ".npz", ".dill"})
_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".zst"})
_NAMES = {
    ".gguf": "GGUF",
    ".onnx": "ONNX",
    ".xml": "OpenVINO",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
}
_ADAPTER = re.compile(r"adapter_(config\.json|model\.(safetensors|bin|pt))")
#: Weights under the parameter names of Mistral's and Meta's own programs.
_MAKERS_OWN = re.compile(r"consolidated([.-]\d[\w.-]*)?\.safetensors")
_SHOWN = 20  #: number of files that an error names

_MERGE = (
    "Name the model that it was trained for, its base: `nightpress submit FOLDER --base MODEL` and `nightpress press FOLDER --base MODEL_FOLDER` "
    "merge the adapter while they read the base, and `nightpress convert FOLDER --base MODEL_FOLDER --out NEW_FOLDER` writes the merged model."
)
_UNPICKLE = (
    "Convert it on your own machine: `nightpress convert FOLDER --out NEW_FOLDER` reads tensors alone, in a confined process. "
    "Then bring NEW_FOLDER."
)
_GRAPH = "Bring the model that it was exported from, as `save_pretrained` wrote it. Nightpress writes {0} itself: name `{1}` in a recipe's `exports`."
_OTHER_FRAMEWORK = "Load it with transformers 4, which still reads {0}, and `save_pretrained` it as safetensors. Then bring that folder."
_TO_DO = {
    ".gguf": "`nightpress convert FILE.gguf --out NEW_FOLDER` reads it back into floats. Then bring NEW_FOLDER. The model that it was made from is "
    "the better source: a GGUF file is most often quantized.",
    ".onnx": "A finished graph is not pressed. " + _GRAPH.format("ONNX", "onnx"),
    ".xml": "A finished graph is not pressed. " + _GRAPH.format("OpenVINO", "openvino"),
    ".h5": _OTHER_FRAMEWORK.format("TensorFlow"),
    ".msgpack": _OTHER_FRAMEWORK.format("Flax"),
}


def is_makers_own(path: str) -> bool:
    """Return whether a file holds weights under the parameter names of their maker's own programs."""
    return _MAKERS_OWN.fullmatch(path) is not None


def is_adapter_file(path: str) -> bool:
    """Return whether a file belongs to an adapter of peft."""
    return _ADAPTER.fullmatch(path) is not None


def is_adapter(paths: Collection[str]) -> bool:
    """Return whether a folder is an adapter of peft without the weights of the model that it adapts."""
    return not {WEIGHTS_FILE, INDEX_FILE} & set(paths) and any(map(is_adapter_file, paths))


def adapter_beside(paths: Collection[str]) -> NightpressError | None:
    """Return an error if an adapter lies beside a model's weights: transformers loads both, so leaving it out would change the model."""
    found = sorted(path for path in paths if is_adapter_file(path))
    if not found:
        return None
    both = " and ".join(found)
    return _refused(
        found[0],
        f"{both} belong to an adapter (LoRA) beside the model: whoever loads the folder gets both.",
        f"Take {both} out to press the model alone. To press both, put them into a folder of their own. {_MERGE}",
    )


def other_kind(paths: Collection[str]) -> NightpressError | None:
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
    if is_adapter(names):
        return _refused(
            min(path for path in names if is_adapter_file(path)),
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
    pickles = [path for path in sorted(names) if PurePosixPath(path).suffix.lower() in _PICKLES]
    torch_weights = [path for path in pickles if path.startswith("pytorch_model")]
    by_suffix = {PurePosixPath(path).suffix.lower(): path for path in sorted(names, reverse=True)}
    for suffix, to_do in _TO_DO.items():
        if suffix in by_suffix and not torch_weights:
            path = by_suffix[suffix]
            return _refused(path, f"The folder holds {_NAMES[suffix]} weights and no safetensors: {path}.", to_do)
    below = sorted(path for path in names if path.endswith((f"/{WEIGHTS_FILE}", f"/{INDEX_FILE}")))
    if below and not torch_weights:
        folder = below[0].rpartition("/")[0]
        return _refused(
            below[0],
            f"The model lies in a sub-folder: {below[0]}.",
            f"Bring {folder}, with the tokenizer's files in it.",
        )
    if pickles:
        shown = ", ".join(path[:100] for path in (torch_weights or pickles)[:_SHOWN])
        return _refused(
            (torch_weights or pickles)[0],
            f"The folder holds weights as pickles, or formats that may hold one, and no safetensors: {shown}. Opening a pickle can run any program.",
            _UNPICKLE,
        )
    archives = [path for path in sorted(names) if PurePosixPath(path).suffix.lower() in _ARCHIVES]
    if archives:
        return _refused(
            archives[0],
            f"The folder holds an archive and no safetensors: {archives[0]}.",
            "Unpack it and bring the files.",
        )
    return None


def _refused(path: str, what: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.UNSUPPORTED_FORMAT, what, hint=hint, file=path)
