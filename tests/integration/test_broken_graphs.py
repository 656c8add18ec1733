"""A graph with packed weights is refused if a single product multiplies by others than were meant, or if a file is missing or cut short."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import compressed_tensors, onnx, openvino
from nightpress.core.compress.export.consumer import Observed, run_consumer
from nightpress.core.compress.export.probes import compare, probed_layers
from nightpress.core.compress.export.task import Task
from nightpress.core.compress.export.verify import verify
from nightpress.core.compress.graph import tracing
from nightpress.core.compress.graph.tracing import Traced
from nightpress.core.compress.grids.pressed_weights import Codes, PressedWeights
from nightpress.core.compress.passes import PassContext
from nightpress.core.compress.passes.registry import MODEL_PASSES
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import Recipe, parse_recipe

FORMS: dict[str, dict[str, Any]] = {
    "int4": {"bits": 4, "group_size": 32},
    "int4 asymmetric": {"bits": 4, "group_size": 32, "symmetric": False},
    "int8": {"bits": 8, "group_size": 64},
}
EXPORTERS: dict[str, Any] = {"onnx": onnx, "openvino": openvino}
LAYER = "bert.encoder.layer.0.attention.self"


class Pressed:
    """A BERT of one block whose weights are packed, and its trace."""

    def __init__(self, model: Path, folder: Path, options: dict[str, Any]) -> None:
        self.recipe: Recipe = parse_recipe(
            {"name": "t", "passes": [{"pass": "weight-only", **options}], "exports": ["onnx"], "evaluate": []}
        )
        header = inspect_model(FolderFiles(model))
        self.task: Task = quality.prepare(self.recipe, header, model, {}, threads=1).task
        context = PassContext(header, folder / "work")
        self.folder = folder / "pressed"
        MODEL_PASSES["weight-only"](model, self.folder, self.recipe.passes[0], context)
        self.traced: Traced = tracing.trace(self.folder, header, self.task.sets[0].sequences, context)

    def judge(self, artifact: Path, runtime: str, scratch: Path) -> Observed:
        """Load an artifact as a job does, and verify it. Raises the errors of the verification."""
        seen = run_consumer(
            EXPORTERS[runtime].CONSUMER,
            artifact,
            self.task,
            name=runtime,
            scratch=scratch,
            probes=probed_layers(self.folder),
        )
        found = compare(self.folder, seen.outputs, seen.loaded_as.get("dtype", ""))
        judged = verify(
            self.recipe, Export(format=runtime), seen, source=seen, traced=self.traced, task=self.task, probes=found
        )
        assert judged.layers == found.layers
        assert found.layers >= 6, "the products of its block"
        return seen


def _first_block(model: Path, folder: Path) -> Path:
    """Copy a BERT without the blocks behind the first one."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_bytes()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layer." not in name or ".layer.0." in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path) -> Callable[[str], Pressed]:
    model = _first_block(bert_tiny, tmp_path_factory.mktemp("bert") / "model")
    made: dict[str, Pressed] = {}

    def get(form: str) -> Pressed:
        if form not in made:
            made[form] = Pressed(model, tmp_path_factory.mktemp(form.replace(" ", "-")), FORMS[form])
        return made[form]

    return get


def misplace_scales(name: str, codes: Codes, _read: Callable[[str], Codes]) -> Codes:
    if not name.startswith(f"{LAYER}.value"):
        return codes
    turned = np.ascontiguousarray(codes.scale.T).reshape(codes.scale.shape)
    return Codes(codes.bits, codes.codes, turned, codes.zero_point)


def swap_queries_and_keys(name: str, codes: Codes, read: Callable[[str], Codes]) -> Codes:
    for mine, other in (("query", "key"), ("key", "query")):
        if name.startswith(f"{LAYER}.{mine}"):
            return read(name.replace(mine, other))
    return codes


def shift_zero_points(name: str, codes: Codes, _read: Callable[[str], Codes]) -> Codes:
    if not name.startswith(f"{LAYER}.value"):
        return codes
    assert codes.zero_point is not None
    top = 2 ** (codes.bits - 1) - 1
    moved = np.where(codes.zero_point < top, codes.zero_point + 1, codes.zero_point - 1)
    return Codes(codes.bits, codes.codes, codes.scale, moved.astype(np.int8))


#: Each form with a fault or two: a fault is found by the layer's answers, whatever form its codes have.
FAULTS = {
    "int4": (misplace_scales,),
    "int4 asymmetric": (swap_queries_and_keys, shift_zero_points),
    "int8": (misplace_scales,),
}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", EXPORTERS)
@pytest.mark.parametrize("form", FORMS)
def test_one_broken_product_is_refused(
    form: str, runtime: str, pressed: Callable[[str], Pressed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The exporter itself is made to write a wrong weight, as a fault of its would."""
    meant = pressed(form)
    EXPORTERS[runtime].save(meant.folder, tmp_path / "whole", meant.traced, [])
    meant.judge(tmp_path / "whole", runtime, tmp_path / "scratch")
    right = PressedWeights.codes
    for fault in FAULTS[form]:
        name = fault.__name__

        def wrong(self: PressedWeights, layer: str, rows: Any = None, fault: Any = fault) -> Codes:
            return fault(layer, right(self, layer, rows), lambda other: right(self, other, rows))

        with monkeypatch.context() as patched:
            patched.setattr(PressedWeights, "codes", wrong)
            EXPORTERS[runtime].save(meant.folder, tmp_path / name, meant.traced, [])
        with pytest.raises(NightpressError) as refused:
            meant.judge(tmp_path / name, runtime, tmp_path / "scratch")
        assert refused.value.code == ErrorCode.VERIFICATION_FAILED, name
        assert LAYER in refused.value.message, "the layer is named"


@pytest.mark.parametrize("fault", ["missing", "half"])
@pytest.mark.parametrize("runtime", ["compressed-tensors", "onnx", "openvino"])
@pytest.mark.slow
def test_a_file_that_is_missing_or_cut_short_is_refused(
    fault: str, runtime: str, pressed: Callable[[str], Pressed], tmp_path: Path
):
    meant, folder = pressed("int4"), tmp_path / runtime
    if runtime == "compressed-tensors":
        shutil.copytree(meant.folder, folder)
        consumer, file = compressed_tensors.CONSUMER, next(folder.glob("*.safetensors"))
    else:
        EXPORTERS[runtime].save(meant.folder, folder, meant.traced, [])
        consumer, file = (
            EXPORTERS[runtime].CONSUMER,
            folder / ("model.onnx" if runtime == "onnx" else "openvino_model.bin"),
        )
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(NightpressError) as refused:
        run_consumer(consumer, folder, meant.task, name=runtime, scratch=tmp_path / "scratch")
    assert refused.value.code in {ErrorCode.VERIFICATION_FAILED, ErrorCode.MALFORMED_MODEL}
