"""Decoding is timed in the hands of the consumer: as many tokens as asked for, as the folder's own settings say."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core.compress import report as reports
from core.compress.evaluate.consumer import run_consumer
from core.compress.evaluate.quality import generation_timings, prepare
from core.compress.export import safetensors
from core.errors import ErrorCode, NightpressError
from core.recipes.inspect import FolderFiles, inspect_model
from core.recipes.models import parse_recipe
from core.recipes.plan import make_plan
from tests.press import lay_out, press
from tests.training import embedder, language_model

SPEED = {"metric": "generation-speed", "batch": [1, 2], "prompt": 12, "tokens": 7, "repeats": 3}
RECIPE = {"name": "r", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"], "evaluate": [SPEED]}


def test_every_run_writes_the_tokens_asked_for_whatever_ends_or_drafts_them(bert_tiny: Path, tmp_path: Path):
    folder = language_model(bert_tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_bytes())
    # Whatever it writes first would end the text: every word is an end.
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(0, 30522, 3)), "bos_token_id": config["bos_token_id"]})
    )
    trial = prepare(parse_recipe(RECIPE), inspect_model(FolderFiles(folder)), folder, {}, threads=1)
    seen = run_consumer(safetensors.CONSUMER, folder, trial.task, name="source", scratch=tmp_path / "scratch")
    assert [(one["batch"], np.shape(one["milliseconds"])) for one in seen.writings] == [(1, (3, 7)), (2, (3, 7))]
    waits = np.concatenate([np.ravel(one["milliseconds"]) for one in seen.writings])
    assert (waits > 0).all()
    assert waits.sum() / 1000 < seen.seconds
    assert all(one["peak_memory_bytes"] <= seen.peak_memory for one in seen.writings)

    one, two = generation_timings(seen, 1)
    assert two.decode_slowest <= two.decode_tokens_per_s <= two.decode_fastest
    slow, middle, fast = sorted(np.asarray(seen.writings[1]["milliseconds"])[:, 1:].sum(axis=1), reverse=True)
    assert two.decode_tokens_per_s == pytest.approx(1000 * 2 * 6 / middle)
    assert (two.decode_slowest, two.decode_fastest) == pytest.approx((12000 / slow, 12000 / fast))
    assert one.prefill_tokens_per_s == pytest.approx(12000 / one.prefill_p50_ms)

    (folder / "generation_config.json").write_text(json.dumps({"assistant_early_exit": 2, "eos_token_id": 102}))
    alone = {**RECIPE, "evaluate": [{**SPEED, "batch": 1}]}
    trial = prepare(parse_recipe(alone), inspect_model(FolderFiles(folder)), folder, {}, threads=1)
    drafted = run_consumer(safetensors.CONSUMER, folder, trial.task, name="source", scratch=tmp_path / "drafted")
    assert np.shape(drafted.writings[0]["milliseconds"]) == (3, 7)


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
    assert [(one.batch, one.prompt, one.tokens) for one in artifact.generation] == [(1, 12, 7), (2, 12, 7)]
    met, missed = report.gates
    ratios = [
        ours.decode_tokens_per_s / theirs.decode_tokens_per_s
        for ours, theirs in zip(artifact.generation, report.source.generation, strict=True)
    ]
    assert met.passed
    assert met.observed == pytest.approx(min(ratios))
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
