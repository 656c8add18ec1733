"""The training loop: the order of the data, the learning rate's schedule, the best step, and a killed run that ends with the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress.data.examples import Examples, batch_order
from nightpress.core.compress.executors.train import learning_rate
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.passes.training import Training
from tests.training import classifier, rows, run_pass

_STEPS = 30
_DISTILL = {
    "pass": "distill",
    "student": {"layers": [0, 2]},
    "logits": {"alpha": 0.5},
    "hidden": {},
    "altered": 0.5,
    "train": {"data": "mine", "length": 16, "batch": 4, "accumulate": 2, "steps": _STEPS, "validation": 0.1,
              "validate_every": 7, "checkpoint_every": 4, "learning_rate": 1e-3},
}  # fmt: skip
_SCRIPT = """\
import sys
from pathlib import Path
from tests.training import run_pass
from tests.integration.test_train_executor import _DISTILL
source, data, work = map(Path, sys.argv[1:])
run_pass(source, work, _DISTILL, data_files={"mine": data}, checkpoint=lambda path, step: print("checkpoint", step, flush=True))
"""


@pytest.fixture(scope="module")
def model(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(bert_tiny, tmp_path_factory.mktemp("model") / "classifier")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(model: Path, data: Path, tmp_path: Path):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    arguments = [sys.executable, "-c", _SCRIPT, str(model), str(data), str(tmp_path / "killed")]
    killed = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment, cwd=root)
    assert killed.stdout is not None
    seen = [killed.stdout.readline() for _ in range(3)]
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()
    assert seen[-1] == "checkpoint 12\n"
    assert not (tmp_path / "killed" / "out").exists()
    whole, _ = run_pass(model, tmp_path / "whole", _DISTILL, data_files={"mine": data})
    resumed, record = run_pass(model, tmp_path / "killed", _DISTILL, data_files={"mine": data})
    assert record.summary["resumed_from"] >= 12
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    curves = {curve.name: curve for curve in record.series}
    assert curves["train loss"].x[-1] == _STEPS
    assert len(curves["train loss"].x) == _STEPS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_ends_with_the_same_bytes_too(model: Path, data: Path, tmp_path: Path):
    def die(_path: str, step: int) -> None:
        if step == 16:
            raise KeyboardInterrupt

    given = {"data_files": {"mine": data}, "device": "cuda"}
    whole, _ = run_pass(model, tmp_path / "whole", _DISTILL, **given)
    with pytest.raises(KeyboardInterrupt):
        run_pass(model, tmp_path / "killed", _DISTILL, checkpoint=die, **given)
    resumed, record = run_pass(model, tmp_path / "killed", _DISTILL, **given)
    assert record.summary["resumed_from"] == 16
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_other_options_or_data_start_anew(model: Path, data: Path, tmp_path: Path):
    first, _ = run_pass(model, tmp_path, _DISTILL, data_files={"mine": data})
    before = (first / "model.safetensors").read_bytes()
    _, again = run_pass(model, tmp_path, _DISTILL, data_files={"mine": data})
    assert again.summary["resumed_from"] == _STEPS
    assert (first / "model.safetensors").read_bytes() == before
    _, other = run_pass(model, tmp_path, _DISTILL | {"hidden": None}, data_files={"mine": data})
    assert other.summary["resumed_from"] == 0


@pytest.mark.slow
def test_the_best_step_is_kept_and_training_stops_when_nothing_gets_better(model: Path, data: Path, tmp_path: Path):
    train = _DISTILL["train"] | {
        "patience": 2,
        "validate_every": 2,
        "learning_rate": 0.5,
        "steps": 200,
        "schedule": "constant",
    }
    _, record = run_pass(model, tmp_path, _DISTILL | {"train": train}, data_files={"mine": data})
    assert record.summary["steps"] < 200
    curve = next(curve for curve in record.series if curve.name == "validation loss")
    assert curve.x[int(np.argmin(curve.y))] == record.summary["best_step"] == record.summary["steps"] - 4
    assert record.summary["validation"]["loss"] == min(curve.y)


@pytest.mark.slow
def test_a_loss_that_overflows_ends_the_job_with_advice(model: Path, data: Path, tmp_path: Path):
    tensors = load_file(model / "model.safetensors")
    broken = shutil.copytree(model, tmp_path / "model")
    save_file(
        tensors | {"classifier.weight": torch.full((2, 32), 3e38)},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(NightpressError) as caught:
        run_pass(broken, tmp_path, _DISTILL, data_files={"mine": data})
    assert caught.value.code == ErrorCode.NUMERICAL_FAILURE
    assert "learning_rate" in caught.value.hint


def _examples(count: int) -> Examples:
    lengths = np.random.default_rng(0).integers(2, 40, count)
    return Examples(tuple(np.arange(length) for length in lengths), None, 0, np.arange(count))


def test_an_epoch_sees_every_example_at_most_once_and_no_two_epochs_are_alike():
    examples = _examples(103)
    orders = [batch_order(examples, 8, seed=1, epoch=epoch) for epoch in range(2)]
    for order in orders:
        seen = np.concatenate(order)
        assert len(order) == 12
        assert len(set(seen.tolist())) == 96
    assert not np.array_equal(np.concatenate(orders[0]), np.concatenate(orders[1]))
    again = batch_order(examples, 8, seed=1, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(orders[0], again, strict=True))


def test_texts_of_like_length_share_a_batch():
    examples = _examples(512)
    spread = [np.ptp([len(examples.ids[at]) for at in rows]) for rows in batch_order(examples, 8, seed=0, epoch=0)]
    assert np.mean(spread) < 3


def test_what_is_held_apart_is_not_learned_from():
    learn, held = _examples(100).split(0.1, seed=3)
    assert held is not None
    assert len(held) == 10
    assert not set(learn.numbers.tolist()) & set(held.numbers.tolist())
    assert _examples(100).split(0.0, seed=3)[1] is None


@pytest.mark.parametrize(("schedule", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_the_learning_rate_rises_then_falls(schedule: str, halfway: float):
    options = Training(schedule=schedule, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(step, 110, options) for step in range(110)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[11] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(halfway, abs=0.01)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=0.02)
