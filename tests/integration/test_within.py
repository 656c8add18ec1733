"""Passes that search for the smallest result within a gate: on real models, measured in their consumers, killed and begun again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nightpress.core.compress.context import Judged, PassContext
from nightpress.core.compress.data.tokenized import open_tokenizer
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import GateResult, PassRecord, Report
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.gates import parse_gate, read_gate
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.press import lay_out, press
from tests.training import classifier, rows

CALIBRATION = {"samples": 16, "length": 32}


class Divergence:
    """Judges folders in this process, by the KL divergence from the source at each token of two texts."""

    data, examples, note = ("ids",), 6, ""

    def __init__(self, source: Path, gate: str) -> None:
        self.gate, self._bound = gate, parse_gate(*read_gate(gate))
        self._ids = torch.from_numpy(open_ids(source))
        self._expected = self._answers(source)
        self.asked: list[str] = []

    def _answers(self, folder: Path) -> torch.Tensor:
        with torch.inference_mode():
            return load_model(folder, inspect_model(FolderFiles(folder)))(self._ids).logits.float()  # [B, S, V]

    def model(self, folder: Path) -> Judged:
        self.asked.append(folder.name)
        divergence = F.kl_div(
            self._answers(folder).log_softmax(-1),
            self._expected.log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        observed = float(divergence) / self._ids.shape[1]
        result = GateResult(
            gate=self.gate,
            artifact="c",
            observed=observed,
            passed=observed <= self._bound.value,
            explanation="by value",
        )
        return Judged(result, result)

    graph = model


def open_ids(source: Path) -> Any:
    import numpy as np

    tokenizer = open_tokenizer(source)
    texts = ["the old lamp stood by the window of the house", "a letter came in winter and nobody read it at all"]
    ids = [tokenizer.encode(text, special=True) for text in texts]
    shortest = min(map(len, ids))
    return np.array([row[:shortest] for row in ids], np.int64)


def _pass(source: Path, work: Path, options: dict[str, Any], judge: Any, **more: Any) -> tuple[Path, PassRecord]:
    made = parse_recipe({"name": "t", "passes": [options], "exports": ["onnx"]}).passes[0]
    context = PassContext(
        header=inspect_model(FolderFiles(source)),
        work_dir=work,
        calibration=Calibration.model_validate(CALIBRATION),
        judge=judge,
        **more,
    )
    work.mkdir(exist_ok=True)
    return work / "out", MODEL_PASSES[options["pass"]](source, work / "out", made, context)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_bits_are_as_few_as_the_gate_allows_and_a_killed_search_ends_with_the_same_bytes(
    bert_tiny: Path, tmp_path: Path
):
    def options(bound: float) -> dict[str, Any]:
        gate = f"kl_divergence <= {bound:.6f}"
        return {"pass": "gptq", "candidates": [2, 8], "group_size": 64, "within": gate}

    def judge(bound: float) -> Divergence:
        return Divergence(bert_tiny, options(bound)["within"])

    fewest, most = (
        judge(1.0).model(_pass(bert_tiny, tmp_path / name, {"pass": "gptq", "bits": bits, "group_size": 64}, None)[0])
        for name, bits in (("int2", 2), ("int8", 8))
    )
    assert fewest.by_end.observed is not None
    assert most.by_end.observed is not None
    assert most.by_end.observed < fewest.by_end.observed / 4
    bound = 0.4 * fewest.by_end.observed
    whole = judge(bound)
    out, record = _pass(bert_tiny, tmp_path / "whole", options(bound), whole)
    found = record.within
    assert found is not None
    assert found.kept
    assert found.beyond is not None
    assert not found.beyond.passed
    bits = record.summary["bits_by_layer"]
    assert set(bits.values()) == {2, 8}
    assert found.chosen == f"int2 in {list(bits.values()).count(2)}, int8 in {list(bits.values()).count(8)} layers"
    # What lies in the folder is what was measured: the same figure comes out again, and the next smaller one misses.
    chosen = next(tried for tried in found.tried if tried.what == found.chosen)
    assert judge(bound).model(out).by_end.observed == chosen.observed
    assert chosen.size_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found.beyond.size_bytes < chosen.size_bytes
    assert len(found.tried) == len(whole.asked) <= 2 + found.candidates.bit_length()
    assert not list((tmp_path / "whole").glob("within-0/*"))

    said: list[str] = []

    def dying(_fraction: float, text: str) -> None:
        said.append(text)
        if sum(text.startswith("measuring") for text in said) == 3:
            raise KeyboardInterrupt

    kept: list[str] = []
    killed, again = judge(bound), judge(bound)
    with pytest.raises(KeyboardInterrupt):
        _pass(
            bert_tiny,
            tmp_path / "killed",
            options(bound),
            killed,
            progress=dying,
            checkpoint=lambda path, _step: kept.append(path),
        )
    assert kept.count("within-0.json") == 2
    assert set(kept) == {"sensitivity-0.json", "within-0.json"}
    # Another machine finds only the checkpoints.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in set(kept):
        (elsewhere / name).write_bytes((tmp_path / "killed" / name).read_bytes())
    resumed, second = _pass(bert_tiny, elsewhere, options(bound), again)
    assert _content(resumed) == _content(out)
    assert len(killed.asked) + len(again.asked) == len(whole.asked)
    assert second.within is not None
    assert [tried.what for tried in second.within.tried] == [tried.what for tried in found.tried]


@pytest.mark.parametrize(
    "options",
    [
        {"pass": "channels", "multiple": 64},
        {"pass": "heads", "across": "global"},
        {"pass": "layers", "importance": "taylor"},
    ],
)
@pytest.mark.slow
def test_shrinking_goes_as_far_as_the_gate_allows(bert_tiny: Path, tmp_path: Path, options: dict[str, Any]):
    judge = Divergence(bert_tiny, "kl_divergence <= 0.02")
    out, record = _pass(bert_tiny, tmp_path, {**options, "within": judge.gate}, judge)
    found = record.within
    assert found is not None
    assert found.kept
    observed = judge.model(out).by_end.observed
    assert observed is not None
    assert observed <= 0.02
    assert found.beyond is not None
    assert found.beyond.observed > 0.02
    if found.chosen == "the model as it was":
        assert observed == 0.0
    else:
        assert [tried.observed for tried in found.tried if tried.what == found.chosen] == [observed]


def _labelled(source: Path, file: Path) -> str:
    """Rows whose labels are the source's own answers."""
    lines = [json.loads(line) for line in rows(file, 96).read_text().splitlines()]
    tokenizer, model = open_tokenizer(source), load_model(source, inspect_model(FolderFiles(source)))
    with torch.inference_mode():
        for line in lines:
            ids = torch.tensor([tokenizer.encode(line["text"], special=True)])
            line["label"] = int(model(ids).logits.argmax())
    return "\n".join(map(json.dumps, lines)) + "\n"


def _job(source: Path, folder: Path, passes: list[dict[str, Any]], data: str) -> Report:
    recipe = {
        "passes": passes,
        "exports": ["onnx"],
        "calibration": CALIBRATION,
        "evaluate": [{"metric": "auto", "data": "mine", "samples": 96, "length": 16}],
    }
    return press(lay_out(folder, source, recipe, {"mine": data}))[1]


@pytest.mark.slow
def test_a_job_measures_candidates_in_their_consumers_with_the_users_labels_and_reports_other_rows(
    bert_tiny: Path, tmp_path: Path
):
    source = classifier(bert_tiny, tmp_path / "source", blocks=3)
    passes = [
        {"pass": "layers", "count": 2, "within": "accuracy >= -45%"},
        {"pass": "static-int8", "within": "kl_divergence <= 0.02"},
    ]
    report = _job(source, tmp_path / "job", passes, _labelled(source, tmp_path / "rows"))
    fewer, rounded = report.passes
    assert fewer.within is not None
    assert rounded.within is not None
    for found in (fewer.within, rounded.within):
        assert (found.data, found.examples, found.note) == (("mine",), 48, "")
        assert found.kept
    assert (fewer.within.gate, rounded.within.gate) == ("accuracy >= -45%", "kl_divergence <= 0.02")
    assert all("on mine" in tried.explanation for tried in fewer.within.tried)
    [artifact] = report.artifacts
    accuracy = next(found for found in artifact.measurements if found.name == "accuracy")
    assert accuracy.n == 48
    html = (tmp_path / "job" / "out" / "report.html").read_text()
    markdown = (tmp_path / "job" / "out" / "report.md").read_text()
    for text in ("How layers kept accuracy", fewer.within.chosen, "one half of the data chooses"):
        assert text in html
        assert text in markdown


@pytest.mark.slow
def test_without_labels_agreement_stands_in_for_accuracy_and_other_figures_are_refused(bert_tiny: Path, tmp_path: Path):
    source = classifier(bert_tiny, tmp_path / "source", blocks=1)
    plain = "".join(
        json.dumps({"text": json.loads(line)["text"]}) + "\n" for line in _labelled(source, tmp_path / "r").splitlines()
    )
    report = _job(source, tmp_path / "job", [{"pass": "static-int8", "within": "accuracy >= -10%"}], plain)
    found = report.passes[0].within
    assert found is not None
    assert found.gate == "top1_agreement >= 0.9"
    assert "no labels" in found.note
    with pytest.raises(NightpressError) as caught:
        _job(source, tmp_path / "refused", [{"pass": "static-int8", "within": "f1 >= -1%"}], plain)
    assert caught.value.code is ErrorCode.INVALID_RECIPE
    assert "f1" in str(caught.value)
