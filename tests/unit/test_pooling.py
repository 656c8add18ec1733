"""Pooling of token vectors: read from the model's folder in one place, and computed in the same way everywhere."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightpress.core.compress.runners.measure import pool
from nightpress.core.compress.solvers import distillation
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from tests.training import embedder

ST = "sentence_transformers"
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": f"{ST}.models.Transformer"}


def _folder(bert_tiny: Path, tmp_path: Path, modules: Any, files: dict[str, Any]) -> Path:
    folder = embedder(bert_tiny, tmp_path / "model")
    if modules is not None:
        files = {"modules.json": modules, **files}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def _module(kind: str, path: str) -> dict[str, Any]:
    return {"idx": 1, "name": "1", "path": path, "type": kind}


_OLD, _NEW = f"{ST}.models.Pooling", f"{ST}.sentence_transformer.modules.pooling.Pooling"
_FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        *(({"pooling_mode": mode}, mode) for mode in _MODES),
        *(
            ({f"pooling_mode_{other}": other == flag for other in _FLAGS}, mode)
            for flag, mode in zip(_FLAGS, _MODES, strict=True)
        ),
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls+max"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({"embedding_dimension": 32}, "mean"),
    ],
)
@pytest.mark.parametrize(("kind", "path"), [(_OLD, "1_Pooling"), (_NEW, "pool"), (None, "1_Pooling")])
def test_a_folders_own_pooling_is_read_wherever_its_module_lies(
    config: dict[str, Any], expected: str, kind: str | None, path: str, bert_tiny: Path, tmp_path: Path
) -> None:
    modules = None if kind is None else [TRANSFORMER, _module(kind, path), _module(f"{ST}.models.Normalize", "2")]
    folder = _folder(bert_tiny, tmp_path, modules, {f"{path}/config.json": config})
    assert inspect_model(FolderFiles(folder)).pooling == expected


def test_a_folder_that_says_nothing_is_pooled_by_the_mean(bert_tiny: Path) -> None:
    assert inspect_model(FolderFiles(bert_tiny)).pooling == "mean"


@pytest.mark.parametrize(
    ("modules", "files", "code", "said"),
    [
        (
            [TRANSFORMER, _module(_OLD, "1_Pooling"), _module(f"{ST}.models.Dense", "2_Dense")],
            {"1_Pooling/config.json": {}},
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            "'Dense' in '2_Dense'",
        ),
        (
            [TRANSFORMER, _module(f"{ST}.models.WeightedLayerPooling", "1_W")],
            {},
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            "WeightedLayerPooling",
        ),
        ([TRANSFORMER], {}, ErrorCode.MALFORMED_MODEL, "0 pooling modules"),
        ([TRANSFORMER, _module(_OLD, "1_Pooling")], {}, ErrorCode.MALFORMED_MODEL, "1_Pooling"),
        (
            [TRANSFORMER, _module(_OLD, "p")],
            {"p/config.json": {"pooling_mode": "attention"}},
            ErrorCode.MALFORMED_MODEL,
            "'attention'",
        ),
        (
            [TRANSFORMER, _module(_OLD, "p")],
            {"p/config.json": {"pooling_mode": []}},
            ErrorCode.MALFORMED_MODEL,
            "empty",
        ),
        ({"0": TRANSFORMER}, {}, ErrorCode.MALFORMED_MODEL, "no list"),
        (None, {"1_Pooling/config.json": [1]}, ErrorCode.MALFORMED_MODEL, "not a JSON object"),
    ],
)
def test_a_module_that_is_not_done_here_is_refused_with_help(
    modules: Any, files: dict[str, Any], code: ErrorCode, said: str, bert_tiny: Path, tmp_path: Path
) -> None:
    folder = _folder(bert_tiny, tmp_path, modules, files)
    with pytest.raises(NightpressError) as caught:
        inspect_model(FolderFiles(folder))
    assert caught.value.code is code
    assert said in caught.value.message
    assert caught.value.hint


def _by_hand(vectors: np.ndarray, mode: str) -> np.ndarray:
    """Pool one text's vectors [S, H], without padding, to [H]."""
    places = np.arange(1, len(vectors) + 1)[:, None]
    return {
        "cls": vectors[0],
        "lasttoken": vectors[-1],
        "max": vectors.max(axis=0),
        "mean": vectors.mean(axis=0),
        "mean_sqrt_len_tokens": vectors.sum(axis=0) / len(vectors) ** 0.5,
        "weightedmean": (places * vectors).sum(axis=0) / places.sum(),
    }[mode]


@pytest.mark.parametrize("pooling", [*_MODES, "cls+max", "mean+lasttoken"])
def test_runners_and_training_pool_as_by_hand_whatever_the_padding(pooling: str) -> None:
    hidden = np.random.default_rng(0).standard_normal((3, 7, 4)).astype(np.float32)
    lengths = [7, 4, 1]
    mask = (np.arange(7) < np.array(lengths)[:, None]).astype(np.int64)
    expected = np.stack(
        [
            np.concatenate([_by_hand(rows[:length], mode) for mode in pooling.split("+")])
            for rows, length in zip(hidden, lengths, strict=True)
        ]
    )
    assert pool(hidden, mask, pooling) == pytest.approx(expected, abs=1e-6)
    learned = distillation.pool(torch.from_numpy(hidden), torch.from_numpy(mask), pooling)
    assert learned.numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pooling", "taken"), [("mean", True), ("cls", True), ("lasttoken", True), ("max", False)])
def test_gguf_takes_the_poolings_that_llama_cpp_has(pooling: str, taken: bool, bert_tiny: Path, tmp_path: Path) -> None:
    folder = _folder(bert_tiny, tmp_path, None, {"1_Pooling/config.json": {"pooling_mode": pooling}})
    header = inspect_model(FolderFiles(folder))
    if taken:
        Export(format="gguf").check(header)
        return
    with pytest.raises(NightpressError, match="by max"):
        Export(format="gguf").check(header)
