"""Several processes that compute one model together: against one process, resumed after a kill, and each way in which one of them fails."""

import contextlib
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from nightpress.core.compress.context import over_ranks
from nightpress.core.compress.ranks.group import Group
from nightpress.core.compress.ranks.launch import Ranks
from nightpress.core.compress.ranks.messages import Failed
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Log, Result, parse_frame
from nightpress.core.handoff.spec import DATA_DIR, SOURCE_DIR, JobSpec
from nightpress.core.recipes.calibration import Calibration
from nightpress.worker.process import ChildProcess
from tests.block_models import context_of, save_model, token_ids
from tests.patience import slowness
from tests.press import lay_out
from tests.rank_presses import DENSE, METHODS, MIXTURE, SAME, distance, load, other_codes, run
from tests.rank_tasks import exchanges, fails, influence_of, waits
from tests.service import eventually, running
from tests.training import classifier, run_pass

# Slow: its processes import the libraries.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tests_can_be_imported", "one_thread")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family in (DENSE, MIXTURE):
        save_model(family, root / family)
    return root


@pytest.fixture(scope="module")
def classifier_model(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    classifier(bert_tiny, folder)
    return folder


def _press(models: Path, family: str, name: str, folder: Path, ranks: Ranks | None, **extra: Any) -> dict[str, Tensor]:
    """Press with a method of METHODS in folder/passes. Returns the tensors that were written."""
    run(models / family, family, name, folder, ranks, **extra)
    return load(folder / "passes")


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_differ_from_one_by_the_order_of_sums(name: str, models: Path, two: Ranks, tmp_path: Path):
    expected = _press(models, DENSE, name, tmp_path / "one", None)
    found = _press(models, DENSE, name, tmp_path / "two", two)
    assert distance(found, expected) < SAME
    assert other_codes(found, expected) < 0.002


def test_a_survey_of_four_processes_finds_the_same_influence_and_saliency(models: Path, four: Ranks, tmp_path: Path):
    source = models / MIXTURE
    context = context_of(source, tmp_path)
    influence, saliency = over_ranks(
        influence_of, source, token_ids(samples=9), samples=9, context=replace(context, ranks=four)
    )
    alone, expected = over_ranks(influence_of, source, token_ids(samples=9), samples=9, context=context)
    assert influence == pytest.approx(alone, rel=1e-5)
    assert saliency.keys() == expected.keys() != set()
    for prefix, sizes in expected.items():
        torch.testing.assert_close(saliency[prefix], sizes, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"pass": "channels", "share": 0.25, "multiple": 8, "importance": "taylor"},
        {"pass": "heads", "share": 0.5, "importance": "activation", "across": "global"},
        {"pass": "layers", "count": 1, "importance": "taylor"},
    ],
    ids=lambda options: f"{options['pass']}",
)
def test_structured_passes_of_two_processes_remove_the_same_units(
    options: dict[str, Any], classifier_model: Path, two: Ranks, tmp_path: Path
):
    """The labels that a classifier's gradients need are drawn for each text, whichever process runs it."""
    export = "onnx" if options.get("across") == "global" else "safetensors"
    calibration = Calibration(samples=9, length=24, dtype="float32")
    by_itself, expected = run_pass(classifier_model, tmp_path / "one", options, export=export, calibration=calibration)
    out, record = run_pass(
        classifier_model, tmp_path / "two", options, export=export, calibration=calibration, ranks=two
    )
    found, alone = record.summary, expected.summary
    assert found.pop("importance", []) == pytest.approx(alone.pop("importance", []), rel=1e-4)
    assert found == alone
    # A few texts barely determine what compensates for removed channels and heads, so that rounding errors of sums count for more.
    assert distance(load(out), load(by_itself)) < (SAME if options["pass"] == "layers" else 10 * SAME)


def test_what_processes_exchange(two: Ranks):
    told: list[tuple[str, tuple[object, ...]]] = []
    found = two.run(exchanges, told=lambda name, given: told.append((name, given)))
    assert found == {
        "total": [[3.0] * 3] * 2,
        "largest": [2.0] * 2,
        "rows": [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]],
        "merged": {"of 0": [1.0, 1.0], "of 1": [2.0, 2.0]},
        "last": [True, False],
        "pids": two.pids,
    }
    assert told == [("progress", (0.5, "half"))]  # of the first process alone


def test_work_is_shared_out_by_its_cost():
    group = Group(1, 3)
    assert group.portion([1, 1, 9, 4, 4, 1]) == [[2], [0, 3, 5], [1, 4]]
    assert [Group(rank, 3).share(8) for rank in range(3)] == [slice(0, 2), slice(2, 5), slice(5, 8)]
    assert {
        turn: [range(1)[Group(rank, 3).share(1, turn)] for rank in range(3)].index(range(1)) for turn in range(3)
    } == {
        0: 2,
        1: 0,
        2: 1,
    }


def test_fewer_samples_than_processes_run_in_one(models: Path, tmp_path: Path):
    with Ranks(4, tmp_path) as ranks:
        context = context_of(models / DENSE, tmp_path, ranks=ranks)
        assert over_ranks(lambda *, context: context.group.size, samples=3, context=context) == 1
        assert ranks.pids == []


def test_a_run_whose_process_was_killed_ends_with_the_same_bytes(models: Path, two: Ranks, tmp_path: Path):
    _press(models, DENSE, "gptq", tmp_path / "whole", two)
    pids: list[int] = []

    def kill(_path: str, step: int) -> None:
        if step == 1 and not pids:
            pids.extend(two.pids)
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(NightpressError) as caught:
        _press(models, DENSE, "gptq", tmp_path / "killed", two, checkpoint=kill)
    assert caught.value.code is ErrorCode.WORKER_LOST
    assert caught.value.kind.retryable
    assert caught.value.details["signal"] == signal.SIGKILL
    assert "Process 2 of the 2" in caught.value.message
    assert running(pids) == []
    assert two.pids == []
    first = tmp_path / "killed" / "passes" / "model-00002-of-00004.safetensors"
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "killed" / "passes" / "model.safetensors.index.json").exists()
    _press(models, DENSE, "gptq", tmp_path / "killed", two)
    assert first.stat().st_mtime_ns == written  # its block was not pressed again
    for path in sorted((tmp_path / "whole" / "passes").iterdir()):
        assert (tmp_path / "killed" / "passes" / path.name).read_bytes() == path.read_bytes()


def test_a_run_with_another_number_of_processes_starts_over(models: Path, two: Ranks, tmp_path: Path):
    """Other sums would meet in one model: the blocks of two processes, and those of one."""
    two_processes = _press(models, DENSE, "gptq", tmp_path / "work", two)
    restarted = _press(models, DENSE, "gptq", tmp_path / "work", None)
    alone = _press(models, DENSE, "gptq", tmp_path / "alone", None)
    assert len(list((tmp_path / "work" / "blocks").iterdir())) == 2
    assert all(torch.equal(restarted[name], alone[name]) for name in alone)
    assert any(not torch.equal(two_processes[name], alone[name]) for name in alone)


def test_a_process_that_is_stopped_ends_the_run(models: Path, two: Ranks, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(two, "_silence_s", 6.0 * slowness())
    pids: list[int] = []

    def stop(_path: str, step: int) -> None:
        if step == 1 and not pids:
            pids.extend(two.pids)
            os.kill(pids[1], signal.SIGSTOP)

    with pytest.raises(NightpressError) as caught:
        _press(models, DENSE, "gptq", tmp_path, two, checkpoint=stop)
    assert caught.value.code is ErrorCode.STALLED
    assert "Process 2 of the 2" in caught.value.message
    assert running(pids) == []


def test_the_error_of_a_process_is_the_runs(tmp_path: Path):
    """The other process fails, too, because it waits in vain. Its error is not the cause."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
    with Ranks(2, tmp_path) as ranks, pytest.raises(torch.OutOfMemoryError, match=str(error)):
        ranks.run(fails, error, told=lambda *_: None)


def test_an_error_keeps_its_code_hint_and_details_on_the_way():
    error = NightpressError(ErrorCode.NUMERICAL_FAILURE, "NaN in a layer.", hint="Look.", layers=["up"])
    found = pickle.loads(pickle.dumps(Failed.of(error, of_peers=False))).exception()
    assert isinstance(found, NightpressError)
    assert found.as_dict() == error.as_dict()
    local = type("LocalError", (Exception,), {})("it can't be pickled")
    assert str(Failed.of(local, of_peers=False).exception()) == "LocalError: it can't be pickled"


def test_a_wait_for_another_process_has_an_end(tmp_path: Path):
    with Ranks(2, tmp_path, timeout_s=2.0 * slowness()) as ranks:
        with pytest.raises(NightpressError) as caught:
            ranks.run(waits, told=lambda *_: None)
        assert ranks.pids == []
    assert caught.value.code is ErrorCode.STALLED


def test_a_job_in_the_sandbox_runs_in_two_processes(bert_tiny: Path, tmp_path: Path):
    """The walls let the processes of a job meet, and none of them is left."""
    recipe = {
        "passes": [{"pass": "wanda"}],
        "exports": ["safetensors"],
        "calibration": {"samples": 8, "length": 32},
        "evaluate": [],
    }
    child = ChildProcess(tmp_path, threads=2, network=False)
    try:
        for folder in (SOURCE_DIR, DATA_DIR):
            (child.job_dir / folder).rmdir()
        lay_out(child.job_dir, bert_tiny, recipe, threads=2)
        spec = JobSpec.load(child.job_dir).model_copy(update={"processes": 2})
        spec.save(child.job_dir)
        child.begin(patience_s=600)
        seen: set[int] = set()
        with open(child.frames, "rb", closefd=False) as stream:
            frames = []
            for line in stream:
                frames.append(parse_frame(line))
                for process in psutil.Process(child.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if "nightpress.core.compress.ranks.nursery" in process.cmdline():
                            seen.add(process.pid)
        assert frames[-1] == Result()
        assert len(seen) == 3  # the two, and the process that they are forked from
        eventually(lambda: not running(list(seen)), within=5)
        warned = [frame.text for frame in frames if isinstance(frame, Log) and "runs in one process" in frame.text]
        assert warned == []
    finally:
        child.kill()
        child.remove()
