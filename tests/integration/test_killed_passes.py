"""A pass that is killed and started again in the same folder leaves the same files as an uninterrupted one.

Other files test this too: test_train_executor.py kills `distill` as a process, test_shrink.py tests `channels` and `heads`, and
test_static_int8.py `static-int8`. `profile` keeps no files for a next attempt.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.recipes.calibration import Calibration
from tests.training import classifier, language_model, rows, run_pass

_TRAIN = {
    "data": "mine",
    "length": 16,
    "batch": 8,
    "steps": 8,
    "validation": 0.2,
    "validate_every": 3,
    "checkpoint_every": 2,
    "learning_rate": 1e-3,
}


class Killed(BaseException):
    """Stands for a kill: no code catches it."""


@pytest.fixture(scope="module")
def folders(bert_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    classifier(bert_tiny, root / "classifier")
    language_model(bert_tiny, root / "language-model")
    rows(root / "rows.jsonl")
    return root


@pytest.mark.parametrize(
    ("options", "model", "export"),
    [
        ({"pass": "magnitude", "across": "global"}, "language-model", "safetensors"),
        ({"pass": "layers", "count": 2}, "language-model", "safetensors"),
        ({"pass": "generation-cache", "mode": "quantized", "residual": 8}, "language-model", "safetensors"),
        ({"pass": "distill", "student": {"layers": 2}, "logits": {"cache": True}, "train": _TRAIN}, "classifier", "onnx"),
        ({"pass": "recover", "lora": {"rank": 4}, "logits": {"alpha": 0.5}, "train": _TRAIN}, "classifier", "onnx"),
        ({"pass": "qat", "bits": 4, "group_size": 16, "train": _TRAIN}, "classifier", "compressed-tensors"),
        ({"pass": "early-exit", "policy": "entropy", "train": _TRAIN}, "classifier", "onnx"),
    ],
    ids=lambda given: given["pass"] if isinstance(given, dict) else None,
)  # fmt: skip
@pytest.mark.slow
def test_it_ends_with_the_same_bytes_wherever_it_was_broken_off(
    options: dict[str, Any], model: str, export: str, folders: Path, tmp_path: Path
):
    def run(work: str, report: Callable[[tuple[str, object]], None]) -> Path:
        source, files = folders / model, {"mine": folders / "rows.jsonl"}
        context = {
            "progress": lambda _done, text: report(("progress", text)),
            "checkpoint": lambda path, step: report((path, step)),
            "metric": lambda name, _value, step: report((name, step)),
            "calibration": Calibration(samples=4, length=32),
        }
        return run_pass(source, tmp_path / work, options, export=export, data_files=files, origin=source, **context)[0]

    reports: list[tuple[str, object]] = []
    whole = run("whole", reports.append)
    moments = [report for report in dict.fromkeys(reports) if not _comes_by_the_clock(report)]
    for share in (0.3, 0.6, 0.95):
        moment = moments[int(share * len(moments))]

        def dying(report: tuple[str, object], moment: object = moment) -> None:
            if report == moment:
                raise Killed

        with pytest.raises(Killed):
            run(f"killed-{share}", dying)
        resumed = run(f"killed-{share}", lambda _: None)
        assert _files(resumed) == _files(whole)


def _comes_by_the_clock(report: tuple[str, object]) -> bool:
    """Whether a report depends on the time: training reports its rate every few seconds, so at different steps in each run."""
    return report[0] == "progress" and str(report[1]).startswith("step ")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
