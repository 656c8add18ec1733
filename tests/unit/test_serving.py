"""What vLLM is asked, how its answers are judged, and what serving costs: all that needs no vLLM."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nightpress.client.cli.doctor import check_vllm
from nightpress.core.compress import report as reports
from nightpress.core.compress.environment import cpu_features
from nightpress.core.compress.evaluate import served
from nightpress.core.compress.export import vllm
from nightpress.core.compress.export.consumer import Observed
from nightpress.core.compress.export.task import TimedServing
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import MeasuredOn, Serving, Verification
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.placement import Seat
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.serving import cache_bytes, lengths, serves, serving_cost
from nightpress.worker import sandbox, view
from tests.every_family import save_family
from tests.headers import decoder
from tests.press import lay_out, press
from tests.reports import full_report

LLAMA = decoder(256, 512, 4, 2, 2, vocabulary=1000)
INT4 = {"pass": "weight-only", "bits": 4, "group_size": 32}
SPEED = {"metric": "latency", "batch": 1, "length": 16}


def seen(tmp_path: Path) -> Observed:
    return Observed({}, (), (), None, {"torch": "2.13.0", "vllm": "0.32.0"}, "snippet", 1.0, tmp_path)


def outputs(nll: np.ndarray, written: np.ndarray) -> dict[str, np.ndarray]:
    return {"vllm.nll": nll, "vllm.tokens": written}


@pytest.mark.parametrize(
    ("target", "export", "task", "expected"),
    [
        (None, "compressed-tensors", "LlamaForCausalLM", True),
        (None, "safetensors", "LlamaForCausalLM", False),
        ("gpu-vllm", "safetensors", "LlamaForCausalLM", True),
        (None, "compressed-tensors", "LlamaForSequenceClassification", False),
    ],
)
def test_which_artifacts_vllm_must_load(target: str | None, export: str, task: str, expected: bool):
    recipe = parse_recipe({"name": "t", "target": target, "passes": [INT4], "exports": ["compressed-tensors"]})
    assert serves(recipe, Export(format=export), LLAMA.model_copy(update={"architecture": task})) == expected


@pytest.mark.parametrize(("form", "expected"), [("fp8", True), ("int8", False)])
def test_vllm_has_no_cache_in_int8(form: str, expected: bool):
    passes = [{"pass": "kv-cache", "format": form}, INT4]
    recipe = parse_recipe({"name": "t", "passes": passes, "exports": ["compressed-tensors"]})
    assert serves(recipe, recipe.exports[0], LLAMA) == expected


def test_a_short_model_gets_shorter_texts():
    short = LLAMA.model_copy(update={"config": {"max_position_embeddings": 64}})
    assert lengths(short, 96, 16) == (48, 16)
    assert lengths(LLAMA, 96, 16) == (96, 16)


def test_the_cache_holds_the_most_requests_at_a_time():
    held = cache_bytes(LLAMA)
    assert held >= 64 * 96 * 2 * 2 * 2 * 64 * 2  # tokens × keys and values × layers × heads × width × bytes
    twice = cache_bytes(decoder(256, 512, 4, 2, 4, vocabulary=1000))
    assert held < twice <= 2 * held


def test_an_estimate_counts_vllm_where_a_worker_has_it():
    recipe = parse_recipe({"name": "t", "passes": [INT4], "exports": ["compressed-tensors"], "evaluate": [SPEED]})
    without, with_it = (make_plan(recipe, LLAMA, [Seat("cpu", 2**40, vllm=has)]).estimate for has in (False, True))
    assert without is not None
    assert with_it is not None
    cost = serving_cost(recipe, LLAMA)
    assert cost is not None
    assert with_it.seconds == pytest.approx(without.seconds + cost.lasts("cpu", with_it.threads), abs=0.2)
    assert with_it.memory_bytes > without.memory_bytes
    assert with_it.memory_bytes >= cost.memory_bytes
    float_alone = parse_recipe({"name": "t", "passes": [], "exports": ["safetensors"], "evaluate": [SPEED]})
    assert serving_cost(float_alone, LLAMA) is None


def test_answers_are_compared_relative_to_their_spread(tmp_path: Path):
    rng = np.random.default_rng(0)
    theirs = rng.gamma(2.0, 1.5, (4, 11))
    noise = 0.02 * rng.standard_normal(theirs.shape)
    written = np.arange(12).reshape(4, 3)
    best = np.concatenate([np.zeros((4, 8), np.int64), written], axis=1)
    best[0, -1] += 1
    reference = {"vllm.nll": theirs.ravel(), "vllm.top1": best.ravel()}
    near = served.answers(outputs(theirs + noise, written), reference)
    assert near.error == pytest.approx(float(np.linalg.norm(noise) / np.linalg.norm(theirs - theirs.mean())), rel=1e-6)
    assert near.gap == pytest.approx(float(np.abs(noise).mean()))
    assert near.chosen == pytest.approx(11 / 12)
    passed = served.verify_served("it", near, seen(tmp_path), bound=served.FLOAT_INPUTS)
    assert (passed.consumer, passed.passed, passed.value) == ("vllm 0.32.0", True, near.error)
    far = served.answers(outputs(rng.permuted(theirs, axis=1), written), reference)
    with pytest.raises(NightpressError, match=r"loaded by vllm 0\.32\.0, but answers otherwise") as refused:
        served.verify_served("it", far, seen(tmp_path), bound=served.ROUNDED_INPUTS)
    assert refused.value.code == ErrorCode.VERIFICATION_FAILED
    lost = served.answers(outputs(np.full_like(theirs, np.nan), written), reference)
    with pytest.raises(NightpressError):
        served.verify_served("it", lost, seen(tmp_path), bound=served.ROUNDED_INPUTS)


def test_rounds_are_summarised_beside_the_sources():
    request = TimedServing(requests=2, prompt=8, tokens=3, repeats=3)
    ours = [
        {"milliseconds": ms, "first": [10.0, 20.0], "between": [[4.0, 6.0], [5.0, 5.0]]} for ms in (30.0, 40.0, 50.0)
    ]
    theirs = [run | {"milliseconds": 2 * run["milliseconds"]} for run in ours]
    found = served.served_timing(request, ours, theirs, by_turns=True)
    assert (found.requests, found.prompt, found.tokens, found.repeats) == (2, 8, 3, 3)
    assert found.tokens_per_s == pytest.approx(1000 * 6 / 40)
    assert (found.slowest, found.fastest) == pytest.approx((1000 * 6 / 50, 1000 * 6 / 30))
    assert found.first_p50_ms == pytest.approx(15.0)
    assert found.token_p50_ms == pytest.approx(5.0)
    assert found.speedup is not None
    assert found.speedup.value == pytest.approx(2.0)
    assert found.speedup.by_turns
    assert served.served_timing(request, ours, None, by_turns=False).speedup is None


def test_a_report_shows_what_vllm_said():
    report = full_report()
    first, *others = report.artifacts
    place = MeasuredOn(device="cpu", name="Xeon", dtype="bfloat16", consumer="vllm 0.32.0")
    run = [{"milliseconds": ms, "first": [12.0], "between": [[7.0, 7.0]]} for ms in (30.0, 31.0)]
    request = TimedServing(requests=8, prompt=64, tokens=32, repeats=2)
    verification = Verification(
        consumer="vllm 0.32.0", passed=True, measure="relative error", value=0.0173, bound=0.08, seconds=3.0,
        load_snippet="model = vllm.LLM(model='onnx')",
    )  # fmt: skip
    serving = Serving(
        measured_on=place,
        verification=verification,
        gap=0.043,
        chosen=0.97,
        wrote="<b>and then</b>",
        timings=(served.served_timing(request, run, run, by_turns=True),),
    )
    source = report.source.model_copy(
        update={
            "serving": Serving(measured_on=place, timings=(served.served_timing(request, run, None, by_turns=False),))
        }
    )
    changed = report.model_copy(
        update={"source": source, "artifacts": (first.model_copy(update={"serving": serving}), *others)}
    )
    read = type(report).model_validate_json(changed.model_dump_json())
    for page in (reports.render_markdown(read), reports.render_html(read)):
        assert "8 of 64 tokens, 32 written" in page
        assert "0.0173" in page
        assert "1.00× [1.00, 1.00], not told apart" in page
        assert "12.0 ms (p95 12.0)" in page
        assert "vllm.LLM(" in page
        assert "<b>and then" not in page


@pytest.mark.slow
def test_without_an_environment_the_report_says_that_vllm_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(vllm.VARIABLE, raising=False)
    recipe = {
        "passes": [INT4],
        "exports": ["compressed-tensors"],
        "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
    }
    _, report, _ = press(lay_out(tmp_path / "job", save_family("llama", tmp_path / "model"), recipe))
    [artifact] = report.artifacts
    assert artifact.serving is None
    assert "vLLM was not run: NIGHTPRESS_VLLM_PYTHON names no environment with it on the worker." in artifact.notes


@pytest.mark.parametrize(
    ("group", "cache", "on_cpu", "on_gpu"),
    [
        ({"input_activations": None, "weights": {"num_bits": 4}}, None, "amx_int8" in cpu_features(), False),
        ({"input_activations": None, "weights": {"num_bits": 8}}, None, False, False),
        ({"input_activations": {"num_bits": 8}, "weights": {"num_bits": 8}}, None, True, True),
        ({"input_activations": None, "weights": {"num_bits": 8}}, {"num_bits": 8}, True, True),
    ],
)
def test_whose_inputs_are_rounded(tmp_path: Path, group: object, cache: object, on_cpu: bool, on_gpu: bool):
    config = {"quantization_config": {"config_groups": {"group_0": group}, "kv_cache_scheme": cache}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vllm.rounds_inputs(tmp_path, "cpu") == on_cpu
    assert vllm.rounds_inputs(tmp_path, "cuda") == on_gpu


def test_vllm_reports_its_use_to_nobody(tmp_path: Path):
    given = vllm.variables(tmp_path, "cpu")
    assert given["VLLM_NO_USAGE_STATS"] == given["DO_NOT_TRACK"] == "1"
    assert given["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert all(Path(path).is_relative_to(tmp_path) for name, path in given.items() if name.endswith(("_DIR", "_ROOT")))


def test_a_child_may_read_the_environment_with_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert view.VLLM_PYTHON == vllm.VARIABLE
    assert vllm.VARIABLE not in sandbox.child_environment(tmp_path, 1)
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.executable).resolve())
    given = sandbox.child_environment(tmp_path, 1, python)
    assert given[vllm.VARIABLE] == str(python)
    before = view.readable()
    monkeypatch.setenv(vllm.VARIABLE, given[vllm.VARIABLE])
    assert {path for path in view.readable() if path not in before} == {tmp_path / "env"}
    assert vllm.interpreter() == python


@pytest.mark.slow
def test_doctor_tries_the_environment(tmp_path: Path):
    assert check_vllm(None).status == "ok"
    for python in (Path(sys.executable), tmp_path / "no-python"):  # the tests' environment has no vLLM
        check = check_vllm(python)
        assert check.status == "failed"
        assert "make vllm" in check.mend
        assert str(python) in check.found
