"""A job that is screened ends right after its passes where few texts show that it surely misses a gate, and else goes on."""

from pathlib import Path
from typing import Any

import pytest

from nightpress.core.compress.evaluate.screening import surely_missed
from nightpress.core.handoff.report import Measurement, read_report
from nightpress.core.recipes.gates import parse_gate
from nightpress.core.service.studies.outcomes import outcome_of
from tests.press import lay_out, press

RECIPE: dict[str, Any] = {
    "passes": [{"pass": "weight-only", "bits": 2, "group_size": 64, "embeddings": True}],
    "exports": ["compressed-tensors"],
    "evaluate": [{"metric": "fidelity", "samples": 32, "length": 16}],
    "screen": True,
}


@pytest.mark.parametrize(("bound", "ended"), [(">= 0.9999", True), (">= 0.01", False)])
@pytest.mark.slow
def test_what_surely_misses_a_gate_is_not_exported(tmp_path: Path, bert_tiny: Path, bound: str, ended: bool):
    gates = {"centred_cosine": bound}
    manifest, report, frames = press(lay_out(tmp_path, bert_tiny, {**RECIPE, "gates": gates}))
    assert (report.screening is not None) == ended
    if not ended:
        assert (manifest.verdict, len(manifest.artifacts)) == ("accepted", 1)
        return
    assert report.screening is not None
    assert (manifest.verdict, manifest.artifacts, report.artifacts) == ("rejected", (), ())
    assert report.verdict == "rejected"
    [missed] = report.screening.gates
    assert missed.observed is not None
    assert missed.observed < 0.9999
    assert [record.name for record in report.passes] == ["weight-only"]
    assert report.notes[0] == report.screening.reason
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"report.html", "report.md", "manifest.json"}
    assert "exporting" not in {getattr(frame, "phase", "") for frame in frames}
    assert read_report(report.model_dump(mode="json")) == report
    outcome = outcome_of("succeeded", None, report.model_dump(mode="json"), gates, "size")
    assert (outcome.state, outcome.goal) == ("screened", None)
    assert outcome.margin == pytest.approx((0.9999 - missed.observed) / 0.9999)
    assert outcome.reason is not None
    assert "centred_cosine >= 0.9999: at best" in outcome.reason


def figure(**more: Any) -> Measurement:
    given = {"name": "perplexity", "value": 12.0, "n": 16, "better": "lower", "data": "builtin:prose"}
    return Measurement.model_validate(given | more)


@pytest.mark.parametrize(
    ("bound", "figures", "missed"),
    [
        ("<= 10", {"low": 11.0, "high": 13.0}, True),  # at best 10.5
        ("<= 10.6", {"low": 11.0, "high": 13.0}, False),
        (">= 13", {"low": 11.8, "high": 12.2}, True),
        ("<= +1%", {"change": 0.05, "change_low": 0.04, "change_high": 0.06}, True),  # at best +3.5%
        ("<= +4%", {"change": 0.05, "change_low": 0.04, "change_high": 0.06}, False),
        ("<= 102%", {"change": 0.05, "change_low": 0.04, "change_high": 0.06}, True),
        ("<= 10", {}, False),  # without an interval nothing is sure
        ("<= +1%", {"low": 11.0, "high": 13.0}, False),
    ],
)
def test_only_the_favourable_end_of_a_widened_interval_decides(bound: str, figures: dict[str, float], missed: bool):
    found = surely_missed(
        [parse_gate("perplexity", bound), parse_gate("size", "<= 1%")], [figure(**figures)], "screening"
    )
    assert bool(found) == missed
