"""Decoding is timed in the consumer's process, for a fixed number of tokens and with the folder's generation settings."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nightpress.core.compress import report as reports
from nightpress.core.compress.evaluate.quality import prepare
from nightpress.core.compress.evaluate.speed import generation_timings
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import Observed, run_consumer
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.training import embedder, language_model

SPEED = {"metric": "generation-speed", "batch": [1, 2], "prompt": 12, "tokens": 7, "repeats": 3}
RECIPE = {"name": "r", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "evaluate": [SPEED]}


@pytest.mark.slow
def test_every_run_writes_the_tokens_asked_for_whatever_ends_or_drafts_them(bert_tiny: Path, tmp_path: Path):
    folder = language_model(bert_tiny, tmp_path / "model")
    # With drafts, several tokens come at once. A third of all tokens end the text.
    settings = {"assistant_early_exit": 2, "eos_token_id": list(range(0, 30522, 3))}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    recipe = parse_recipe({**RECIPE, "evaluate": [{**SPEED, "batch": 1}]})
    trial = prepare(recipe, inspect_model(FolderFiles(folder)), folder, {}, threads=1)
    seen = run_consumer(safetensors.CONSUMER, folder, trial.task, name="source", scratch=tmp_path / "scratch")
    (writing,) = seen.writings
    waits = np.asarray(writing["milliseconds"])
    assert waits.shape == (3, 7)
    assert (waits > 0).all()
    assert waits.sum() / 1000 < seen.seconds
    assert 0 < writing["peak_memory_bytes"] <= seen.peak_memory


def test_rates_count_the_whole_batch_and_medians_are_of_runs():
    runs = [[100.0, 10, 10, 20], [60.0, 5, 5, 10], [80.0, 20, 20, 40]]
    written = {"batch": 2, "prompt": 12, "tokens": 4, "cached": True, "milliseconds": runs, "peak_memory_bytes": 5}
    seen = Observed({}, (), (written,), 9, {}, "", 1.0, Path("unused"))
    (timing,) = generation_timings(seen, 1)
    assert (timing.prefill_p50_ms, timing.prefill_tokens_per_s) == pytest.approx((80, 2 * 12 / 0.08))
    # Three tokens per row after the first, in 40, 20 and 80 ms.
    assert (timing.decode_slowest, timing.decode_tokens_per_s, timing.decode_fastest) == pytest.approx((75, 150, 300))
    assert timing.token_p50_ms == 10
    assert 20 < timing.token_p95_ms < 40


@pytest.mark.slow
def test_a_job_reports_it_and_gates_on_the_worst_shape(bert_tiny: Path, tmp_path: Path):
    job = lay_out(
        tmp_path / "job",
        language_model(bert_tiny, tmp_path / "source"),
        {
            "passes": [{"pass": "magnitude"}],
            "exports": ["safetensors"],
            "evaluate": [SPEED],
            "gates": {"decode_tokens_per_s": ">= 0.01x", "prefill_tokens_per_s": ">= 1000x"},
        },
    )
    _, report, _ = press(job)
    (artifact,) = report.artifacts
    assert [(timing.batch, timing.prompt, timing.tokens) for timing in artifact.generation] == [(1, 12, 7), (2, 12, 7)]
    met, missed = report.gates
    speedups = [timing.decode_speedup for timing in artifact.generation]
    assert all(
        speedup is not None and speedup.by_turns and speedup.low <= speedup.value <= speedup.high
        for speedup in speedups
    )
    assert met.passed
    assert met.observed == pytest.approx(min(speedup.low for speedup in speedups if speedup is not None))
    assert not missed.passed
    for page in (reports.render_markdown(report), reports.render_html(report)):
        assert "Decode, batch 2 × prompt of 12, 7 written" in page
        assert f"{artifact.generation[1].decode_tokens_per_s:,.1f} tokens/s" in page


@pytest.mark.parametrize(("make", "prompt", "says"), [(embedder, 12, "embedding"), (language_model, 4096, "positions")])
def test_a_model_that_does_not_write_or_not_so_far_is_refused(
    make: Callable[[Path, Path], Path], prompt: int, says: str, bert_tiny: Path, tmp_path: Path
):
    header = inspect_model(FolderFiles(make(bert_tiny, tmp_path / "model")))
    with pytest.raises(NightpressError) as error:
        make_plan(parse_recipe({**RECIPE, "evaluate": [{**SPEED, "prompt": prompt}]}), header)
    assert error.value.code is ErrorCode.INVALID_RECIPE
    assert says in str(error.value)
