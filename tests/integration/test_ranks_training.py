"""Training in several processes: against one process, resumed after a kill, and a process that fails."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.errors import ErrorCode, NightpressError
from tests.rank_tasks import share_out_all
from tests.service import running
from tests.training import classifier, embedder, language_model, masked_model, rows, run_pass

#: Largest distance of weights from those of one process, relative to their norm. Sums in another order differ by about 1e-7, and Adam divides
#: gradients by their size: where one is about zero, its rounding error decides a step.
SAME = 1e-5
#: The same where the heads of early exits draw their own dropout.
DROPPED_OUT = 1e-2
_TRAIN = {"data": "mine", "length": 16, "batch": 5, "steps": 5, "validation": 0.1, "validate_every": 2, "learning_rate": 1e-3}  # fmt: skip
_HALVES = {"layers": [0, 2]}
_NARROW = {"config": {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "answers and labels, in two halves of a batch": (
        "classifier",
        {"pass": "distill", "student": _HALVES, "logits": {"alpha": 0.5}, "train": _TRAIN | {"accumulate": 2}},
    ),
    "hidden states and relations, with gradient checkpointing": (
        "classifier",
        {
            "pass": "distill",
            "student": _NARROW,
            "hidden": {"layers": [1, 3]},
            "relations": {"heads": 4, "layer": -1},
            "train": _TRAIN | {"gradient_checkpointing": True, "freeze_embeddings": False},
        },
    ),
    "a language model": (
        "language model",
        {"pass": "distill", "student": _HALVES, "logits": {"alpha": 0.5}, "hidden": {}, "train": _TRAIN},
    ),
    "answers kept on disk": (
        "language model",
        {"pass": "distill", "student": _HALVES, "logits": {"cache": True, "cache_top": 8}, "train": _TRAIN},
    ),
    "masked words": ("masked language model", {"pass": "distill", "student": _HALVES, "train": _TRAIN}),
    "vectors": ("embedder", {"pass": "distill", "student": _HALVES, "train": _TRAIN}),
    "a pruned model": ("pruned", {"pass": "recover", "train": _TRAIN}),
    "low-rank changes": ("pruned", {"pass": "recover", "lora": {"rank": 4}, "train": _TRAIN}),
    "rounded weights": ("language model", {"pass": "qat", "bits": 8, "train": _TRAIN}),
    "early exits": ("classifier", {"pass": "early-exit", "alpha": 0.5, "train": _TRAIN}),
}
#: Cases that are also run as large models are: shared out block by block, with the teacher and what is frozen.
_BY_BLOCK = (
    "hidden states and relations, with gradient checkpointing",
    "low-rank changes",
    "rounded weights",
    "early exits",
)
_EXPORTS = {"early-exit": "onnx", "qat": "compressed-tensors"}


# Slow: its processes import the libraries.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tests_can_be_imported", "one_thread")]


@pytest.fixture(scope="module")
def models(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a model without dropout: what it draws depends on the number of processes."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Callable[[Path, Path], Path]] = {
        "classifier": classifier,
        "pruned": classifier,
        "language model": language_model,
        "masked language model": masked_model,
        "embedder": embedder,
    }

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            made[kind](bert_tiny, folder)
            config = json.loads((folder / "config.json").read_text())
            config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            (folder / "config.json").write_text(json.dumps(config))
            _change(folder / "model.safetensors", _CHANGES.get(kind, lambda tensor: tensor))
        return folder

    return make


#: Of the linear layers' weights: a half is pruned; or answers become sure, so that there is something to learn.
_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "pruned": lambda weight: weight * (torch.arange(weight.shape[1]) % 2),
    "language model": lambda weight: 10 * weight,
}


def _change(file: Path, how: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(file)
    linears = (name for name in tensors if name.endswith(("dense.weight", "proj.weight", "lm_head.weight")))
    save_file(tensors | {name: how(tensors[name]) for name in linears}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 48)


@pytest.fixture(scope="module")
def by_block(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with Ranks(2, tmp_path_factory.mktemp("by block")) as ranks:
        ranks.run(share_out_all, told=lambda *_: None)
        yield ranks


def _train(source: Path, folder: Path, options: dict[str, Any], data: Path, **more: Any) -> tuple[Path, Any]:
    export = _EXPORTS.get(options["pass"], "safetensors")
    return run_pass(source, folder, options, export=export, data_files={"mine": data}, **more)


def _load(folder: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(folder)} {name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), expected[name].double()) for name in expected]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)


@pytest.mark.parametrize(("name", "large"), [*((name, False) for name in CASES), *((name, True) for name in _BY_BLOCK)])
def test_two_processes_differ_from_one_by_the_order_of_sums(
    name: str, large: bool, models: Callable[[str], Path], data: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    kind, options = CASES[name]
    source = models(kind)
    origin = models("classifier") if kind == "pruned" else None
    one, alone = _train(source, tmp_path / "one", options, data, origin=origin)
    ranks = request.getfixturevalue("by_block" if large else "two")
    out, record = _train(source, tmp_path / "two", options, data, ranks=ranks, origin=origin)
    assert _distance(_load(out), _load(one)) < (DROPPED_OUT if name == "early exits" else SAME)
    assert {file.name for file in out.iterdir()} == {file.name for file in one.iterdir()}
    if name == "a pruned model":
        given = _load(source)
        for at, tensor in _load(out).items():
            assert not at.endswith("dense.weight") or torch.equal(tensor == 0, given[at] == 0)
    if name == "early exits":
        return
    assert record.summary["best_step"] == alone.summary["best_step"]
    for found, expected in zip(record.series, alone.series, strict=True):
        assert (found.name, found.x) == (expected.name, expected.x)
        assert found.y == pytest.approx(expected.y, rel=1e-3, abs=1e-6)


def test_a_training_whose_process_was_killed_ends_with_the_same_bytes(
    models: Callable[[str], Path], data: Path, by_block: Ranks, tmp_path: Path
):
    """With dropout, early stopping, masked weights of the best step, and gradients of several batches."""
    source = shutil.copytree(models("pruned"), tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1}))
    options = {"pass": "recover", "train": _TRAIN | {"steps": 9, "accumulate": 2, "patience": 9, "checkpoint_every": 2}}
    more: dict[str, Any] = {"ranks": by_block, "origin": models("classifier")}
    whole, expected = _train(source, tmp_path / "whole", options, data, **more)
    pids: list[int] = []

    def kill(_path: str, step: int) -> None:
        if step == 4 and not pids:
            pids.extend(by_block.pids)
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(NightpressError) as caught:
        _train(source, tmp_path / "killed", options, data, checkpoint=kill, **more)
    assert caught.value.code is ErrorCode.WORKER_LOST
    assert caught.value.details["signal"] == signal.SIGKILL
    assert running(pids) == []
    by_block.run(share_out_all, told=lambda *_: None)
    resumed, record = _train(source, tmp_path / "killed", options, data, **more)
    assert record.summary["resumed_from"] >= 4
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert record.series == expected.series


def test_a_training_with_another_number_of_processes_starts_over(
    models: Callable[[str], Path], data: Path, two: Ranks, tmp_path: Path
):
    options = {"pass": "distill", "student": _HALVES, "train": _TRAIN | {"steps": 2, "validation": 0}}
    _train(models("embedder"), tmp_path, options, data, ranks=two)
    _, again = _train(models("embedder"), tmp_path, options, data, ranks=two)
    assert again.summary["resumed_from"] == 2
    _, other = _train(models("embedder"), tmp_path, options, data)
    assert other.summary["resumed_from"] == 0


def test_a_loss_that_overflows_is_the_runs_error(models: Callable[[str], Path], data: Path, two: Ranks, tmp_path: Path):
    source = shutil.copytree(models("classifier"), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    broken = {"classifier.weight": torch.full((2, 32), 3e38)}
    save_file(tensors | broken, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NightpressError) as caught:
        _train(source, tmp_path, {"pass": "distill", "student": _HALVES, "train": _TRAIN}, data, ranks=two)
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
    assert two.pids == []
