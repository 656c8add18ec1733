"""Files of GGUF and MLX with a single broken matrix are refused, and in every form an artifact whose shard is missing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import gguf, mlx
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.compress.export.probes import ProbeResult, compare, probed_layers
from nightpress.core.compress.grids.pressed_weights import Codes, PressedWeights
from nightpress.core.compress.runners.measure import probe_rows
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.folders import load_tensors, tiny_llama
from tests.integration.test_broken_layers import FORMS, LAYER, asked, pressed_llama
from tests.integration.test_decoder_exports import byte_level_tokenizer
from tests.press import lay_out, press

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

_INT: dict[str, Any] = {"pass": "weight-only", "ranges": "extremes", "group_size": 32}
#: Passes → the type in which GGUF holds their codes
GGUF_FORMS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "int4": ([_INT | {"bits": 4}], "q8_0"),
    "int4 asymmetric": ([_INT | {"bits": 4, "symmetric": False}], "q8_0"),
    "int8": ([_INT | {"bits": 8}], "q8_0"),
    "q4_k": ([{"pass": "k-quants", "type": "q4_k"}], "q8_0"),
    **{f"floats in {kind}": ([], kind) for kind in ("f32", "f16", "q8_0", "q6_k", "q5_0", "q4_k")},
}
#: Pass, and the faults to try: each starts a process that imports MLX. Between them, the forms have all faults.
MLX_FORMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "int4 asymmetric": (_INT | {"bits": 4, "symmetric": False}, ["zeros", "missing"]),
    "int8": (_INT | {"bits": 8}, ["scale", "swapped"]),
}
Read = Callable[[str], Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(
        tmp_path_factory.mktemp("models") / "llama",
        dtype=torch.float32,
        hidden_size=256,
        intermediate_size=256,
        vocab_size=400,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    assert byte_level_tokenizer(folder) <= 400
    return folder


def turned(scale: Any) -> Any:
    return np.ascontiguousarray(scale.T).reshape(scale.shape)


def misplace_scales(name: str, read: Read) -> Any:
    """Of codes, the scales; of floats, the whole matrix; of blocks, each row's first scale."""
    found = read(name)
    if name != f"{LAYER}.o_proj.weight":
        return found
    if isinstance(found, Codes):
        return Codes(found.bits, found.codes, turned(found.scale), found.zero_point)
    if found.dtype == np.uint8:
        found = found.copy()
        found[:, :2] = found[::-1, :2]
        return found
    return turned(found)


def swap_queries_and_keys(name: str, read: Read) -> Any:
    for mine, other in (("q_proj", "k_proj"), ("k_proj", "q_proj")):
        if name == f"{LAYER}.{mine}.weight":
            return read(name.replace(mine, other))
    return read(name)


def shift_zero_points(name: str, read: Read) -> Any:
    found = read(name)
    if name != f"{LAYER}.o_proj.weight" or not isinstance(found, Codes) or found.zero_point is None:
        return found
    top = 2 ** (found.bits - 1) - 1
    moved = np.where(found.zero_point < top, found.zero_point + 1, found.zero_point - 1).astype(np.int8)
    return Codes(found.bits, found.codes, found.scale, moved)


FAULTS = {"scale": misplace_scales, "swapped": swap_queries_and_keys, "zeros": shift_zero_points}


def faults_of(form: str) -> list[str]:
    return [name for name in FAULTS if name != "zeros" or "asymmetric" in form]


def with_fault(fault: str, save: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Save while everything that is read of the pressed weights has a fault, as an exporter's own fault would make it."""
    with monkeypatch.context() as patched:
        for reader in ("codes", "floats", "block_bytes"):
            right = getattr(PressedWeights, reader)

            def wrong(self: PressedWeights, name: str, right: Any = right) -> Any:
                return FAULTS[fault](name, lambda other: right(self, other))

            patched.setattr(PressedWeights, reader, wrong)
        save()


def pressed_for(passes: list[dict[str, Any]], source: Path, folder: Path) -> Path:
    return pressed_llama(source, folder, passes[0]) if passes else source


@pytest.mark.parametrize("form", GGUF_FORMS)
@pytest.mark.slow
def test_a_broken_matrix_in_a_gguf_file_is_named(
    form: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes, kind = GGUF_FORMS[form]
    pressed, header = pressed_for(passes, source, tmp_path), inspect_model(FolderFiles(source))

    def save(name: str) -> Path:
        gguf.save(pressed, tmp_path / name, header, weights=kind, pooling="mean")
        return tmp_path / name

    whole = gguf.compare_layers(pressed, save("whole"), header)
    assert whole.layers == 15, "two blocks of seven, and the table of embeddings"
    assert whole.error < whole.bound / 2
    for fault in faults_of(form):
        with_fault(fault, lambda fault=fault: save(fault), monkeypatch)  # type: ignore[misc]
        found = gguf.compare_layers(pressed, tmp_path / fault, header)
        assert found.error > 1.2 * found.bound, fault
        assert found.worst.startswith(LAYER), fault


@pytest.mark.slow
def test_a_job_compares_each_matrix_of_a_gguf_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llama_cpp")
    recipe = {"passes": [_INT | {"bits": 4}], "exports": ["gguf"], "evaluate": []}
    _, report, _ = press(lay_out(tmp_path / "whole", source, recipe))
    verification = report.artifacts[0].verification
    assert verification is not None
    assert verification.layers == 15
    right = gguf.save

    def wrong(*given: Any, **more: Any) -> None:
        with_fault("scale", lambda: right(*given, **more), monkeypatch)

    monkeypatch.setattr(gguf, "save", wrong)
    with pytest.raises(NightpressError, match="multiplies by other weights") as refused:
        press(lay_out(tmp_path / "broken", source, recipe))
    assert f"{LAYER}.o_proj" in refused.value.message


@pytest.mark.slow
@pytest.mark.parametrize("form", MLX_FORMS)
def test_a_broken_layer_in_mlx_is_named(form: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install '.[mlx]'")
    pass_, faults = MLX_FORMS[form]
    pressed = pressed_llama(source, tmp_path, pass_)
    recipe = parse_recipe({"name": "t", "passes": [pass_], "exports": ["mlx"], "evaluate": []})
    task = quality.prepare(recipe, inspect_model(FolderFiles(source)), source, {}, threads=1).task

    def found(name: str) -> ProbeResult:
        seen = run_consumer(
            mlx.CONSUMER, tmp_path / name, task, name=name, scratch=tmp_path / "scratch", probes=probed_layers(pressed)
        )
        return compare(pressed, seen.outputs, seen.loaded_as["dtype"])

    mlx.save(pressed, tmp_path / "whole")
    whole = found("whole")
    assert whole.layers == 14
    assert whole.error < whole.bound / 2
    for fault in faults:
        if fault == "missing":
            next((tmp_path / "whole").glob("*.safetensors")).unlink()
            with pytest.raises(NightpressError):
                found("whole")
            continue
        with_fault(fault, lambda fault=fault: mlx.save(pressed, tmp_path / fault), monkeypatch)  # type: ignore[misc]
        broken = found(fault)
        assert broken.error > 2.5 * broken.bound, fault
        assert broken.worst.startswith(LAYER), fault


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the numbers that happen to be in memory
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_a_missing_shard_is_refused_in_every_form(form: str, source: Path, tmp_path: Path):
    """Also where the index does not name the shard any more: transformers would make up the weights that it lacks."""
    pressed = pressed_llama(source, tmp_path, FORMS[form])
    folder = tmp_path / "sharded"
    shutil.copytree(pressed, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tensors = load_tensors(pressed)
    parts = {
        f"model-{at}.safetensors": {name: tensor for name, tensor in tensors.items() if (LAYER in name) is bool(at)}
        for at in range(2)
    }
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})

    def index(files: list[str]) -> None:
        named = {name: file for file in files for name in parts[file]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": named}))

    index(list(parts))
    assert asked(folder, pressed).error < 2e-2
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(OSError, match=r"model-1\.safetensors"):
        asked(folder, pressed)
    index(["model-0.safetensors"])
    try:
        found = asked(folder, pressed)
    except (RuntimeError, ValueError, KeyError, AttributeError, NotImplementedError):
        return
    assert not found.error <= found.bound  # memory that was never written may hold NaN
    assert found.worst.startswith(LAYER)


def test_some_rows_of_floats_are_those_of_the_whole_matrix(source: Path):
    weights = PressedWeights(source)
    name = f"{LAYER}.o_proj.weight"
    rows = probe_rows(weights.shape(name)[0])
    np.testing.assert_array_equal(weights.rows(name, rows), weights.floats(name)[rows])
