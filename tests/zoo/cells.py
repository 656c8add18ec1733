"""What Nightpress does with a model: each cell of the table works, is refused with a reason, or fails."""

import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from nightpress.core.compress.export import compressed_tensors, mlx
from nightpress.core.compress.grids.stored import from_tensors
from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.passes import Quantizing
from nightpress.core.recipes.plan import make_plan
from tests.folders import load_tensors
from tests.zoo.graphs import graph_distance
from tests.zoo.llama import SHAPES, llama_cpp_distance
from tests.zoo.models import answers, inputs_of, load

_SECONDS = 120  #: of processor time for one cell, so that a busy machine changes nothing
_NEAR = 1e-3  #: relative distance of a loaded artifact's outputs from those of the model that it should be
#: Of an artifact that rounds activations, too.
_ROUNDED = 0.5
_GRAPH = 0.5  #: of a graph in dynamic int8
_CACHED = 0.3  #: of an artifact that rounds cached keys and values
_LLAMA_CPP = (
    0.01  #: of a GGUF file in float32: llama.cpp rounds what it multiplies, and caches keys and values in float16
)

CELLS: Mapping[str, list[dict[str, Any]]] = {
    "weight-only": [{"pass": "weight-only", "bits": 8, "group_size": None, "ranges": "extremes"}],
    "gptq": [{"pass": "gptq", "bits": 4, "group_size": None}],
    "awq": [{"pass": "awq", "bits": 4, "group_size": None, "symmetric": True}],
    "smoothquant": [{"pass": "smoothquant"}],
    "wanda": [{"pass": "wanda"}],
    "kv-cache": [
        {"pass": "kv-cache"},
        {"pass": "weight-only", "bits": 8, "group_size": None, "ranges": "extremes"},
    ],
    "layers": [{"pass": "layers", "count": 1}],
    "onnx": [{"pass": "dynamic-int8"}],
    "openvino": [{"pass": "dynamic-int8"}],
    "gguf": [],
    "mlx": [{"pass": "weight-only", "bits": 4, "group_size": None, "ranges": "extremes"}],
}
_FLOAT = {"wanda", "layers"}
_EXPORTS = {"onnx", "openvino", "gguf", "mlx"}


@dataclass(frozen=True)
class Cell:
    state: Literal["works", "refused", "fails"]
    why: str = ""


def examine(class_name: str, source: Path, work: Path, names: Collection[str] = CELLS.keys()) -> dict[str, Cell]:
    """Return each cell of a model, by its name."""
    found: dict[str, Cell] = {}
    try:
        header = inspect_model(FolderFiles(source))
    except NightpressError as error:
        return {"inspect": Cell("refused", error.message)}
    found["inspect"] = Cell("works")
    # An export needs no answers of the source, and neither does what no plan takes.
    of_passes = any(name not in _EXPORTS and _is_planned(name, header) for name in names)
    expected = answers(load(class_name, source)) if of_passes else torch.empty(0)
    for name in names:
        found[name] = _cell(lambda name=name: _press(name, class_name, header, source, work / name, expected))
        shutil.rmtree(work / name, ignore_errors=True)
    return found


def recipe_of(name: str) -> Recipe:
    export = name if name in _EXPORTS else "safetensors" if name in _FLOAT else "compressed-tensors"
    return parse_recipe({"name": "r", "passes": CELLS[name], "exports": [export], "evaluate": []})


def _is_planned(name: str, header: ModelHeader) -> bool:
    try:
        make_plan(recipe_of(name), header)
    except NightpressError:
        return False
    return True


def _cell(check: Callable[[], None]) -> Cell:
    try:
        with _limited():
            check()
    except NightpressError as error:
        return Cell("refused", error.message)
    except Exception as error:
        return Cell("fails", f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}")
    return Cell("works")


def _press(name: str, class_name: str, header: ModelHeader, source: Path, work: Path, before: Tensor) -> None:
    recipe = recipe_of(name)
    if name != "gguf" or header.model_type not in SHAPES:
        make_plan(recipe, header)
    if name == "gguf":
        distance = llama_cpp_distance(header.model_type, class_name, work, recipe)
        assert distance < _LLAMA_CPP, f"llama.cpp's answers are {distance:.2g} from what they should be"
        return
    if name == "mlx":
        distance = mlx_distance(class_name, source, work, recipe)
        assert distance < _NEAR, f"mlx-lm's answers are {distance:.2g} from what they should be"
        return
    if name in _EXPORTS:
        distance = graph_distance(name, header, source, work, recipe.passes[0])
        assert distance < _GRAPH, f"the graph is {distance:.2g} from the model"
        return
    out, changed = pressed(recipe, source, work)
    if name in _FLOAT:
        after = answers(load(class_name, out))
        assert bool(torch.isfinite(after).all()), "its outputs are not finite"
        assert after.shape != before.shape or not torch.equal(after, before), "nothing changed"
        return
    reference = answers(load(class_name, as_floats(source, out, work / "floats", recipe)))
    after = answers(load(class_name, out))
    bound = {"smoothquant": _ROUNDED, "kv-cache": _CACHED}.get(name, _NEAR)
    distance = float((after - reference).norm() / reference.norm().clamp(min=1e-6))
    assert distance < bound, f"the loaded artifact is {distance:.2g} from what it should be"
    moved = float((reference - before).norm() / before.norm())
    assert moved > 0, "nothing changed"
    if name == "weight-only":
        by_hand = answers(load(class_name, rounded_by_hand(source, changed, work / "hand")))
        distance = float((after - by_hand).norm() / by_hand.norm().clamp(min=1e-6))
        assert distance < _NEAR, f"it is {distance:.2g} from rounding by hand"


def mlx_distance(class_name: str, source: Path, work: Path, recipe: Recipe) -> float:
    """The larger relative distance of mlx-lm's answers from those of transformers: for the source, and for a model of codes."""
    out, _ = pressed(recipe, source, work / "pressed")
    found = []
    for made, floats in ((source, source), (out, as_floats(source, out, work / "floats", recipe))):
        folder = work / f"{made.name} in mlx"
        mlx.save(made, folder)
        model = load(class_name, floats)
        theirs = answers(model)
        found.append(float((logits_in_mlx(folder, inputs_of(model)["input_ids"]) - theirs).norm() / theirs.norm()))
    return max(found)


def logits_in_mlx(folder: Path, ids: Tensor) -> Tensor:
    """mlx-lm's logits [B, S, V] for a folder."""
    os.environ["MLX_DISABLE_COMPILE"] = "1"  # it would start a C++ compiler
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return torch.from_numpy(np.array(model(mx.array(ids.numpy())).astype(mx.float32)))


def pressed(recipe: Recipe, source: Path, work: Path) -> tuple[Path, list[str]]:
    """Run a recipe's passes. Returns the folder of the artifact, and the names of the weights that the last pass changed."""
    folder, changed = source, []
    for index, options in enumerate(recipe.passes):
        context = PassContext(
            header=inspect_model(FolderFiles(folder)),
            work_dir=work / "work",
            origin=source,
            index=index,
            calibration=Calibration(samples=8, length=32, dtype="float32"),
        )
        (work / "work").mkdir(parents=True, exist_ok=True)
        record = MODEL_PASSES[options.pass_](folder, work / str(index), options, context)
        folder, changed = work / str(index), [f"{layer.name}.weight" for layer in record.layers]
    if not any(isinstance(options, Quantizing) for options in recipe.passes):
        return folder, changed
    compressed_tensors.save(folder, work / "out")
    return work / "out", changed


def as_floats(source: Path, out: Path, folder: Path, recipe: Recipe) -> Path:
    """Save the source with the weights of an artifact, dequantized from its tensors: the model that a loader should get."""
    last = recipe.passes[-1]
    assert isinstance(last, Quantizing)
    written, floats = load_tensors(out), load_tensors(source)
    for name in floats:
        coded = f"{name}_scale" in written
        floats[name] = from_tensors(name, last.scheme(module_of_name(name)), written) if coded else written[name]
    return _saved(source, floats, folder)


def rounded_by_hand(source: Path, names: list[str], folder: Path) -> Path:
    """Save the source with these weights rounded to int8 with one scale a row, in plain torch."""
    floats = load_tensors(source)
    for name in names:
        weight = floats[name]
        high, low = weight.amax(1, keepdim=True), weight.amin(1, keepdim=True)
        step = torch.maximum(high / 127.5, -low / 128).clamp(min=0)
        codes = torch.where(step > 0, weight / step.clamp(min=1e-30), 0).round().clamp(-128, 127)
        floats[name] = codes * step
    return _saved(source, floats, folder)


def module_of_name(name: str) -> str:
    return name.removesuffix(".weight")


def _saved(source: Path, tensors: dict[str, Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


@contextmanager
def _limited() -> Iterator[None]:
    """Raises TimeoutError in this context after `_SECONDS`."""

    def stop(_signal: int, _frame: Any) -> None:
        raise TimeoutError(f"it took more than {_SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
