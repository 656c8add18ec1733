"""How many GPUs a plan gives a job, and what it says about it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.gpu_count import GpuCount, Spread, count_gpus
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.placement import Need, Seat
from nightpress.core.recipes.plan import Plan, make_plan
from tests.headers import decoder

GB = 10**9
MODEL = decoder(8192, 28672, 80, 8, 64, vocabulary=128256)
HOST = Seat("gpu", 1500 * GB, 16, 140 * GB, gpus=8)


def recipe(gpus: object = "auto", *, passes: Sequence[object] = ({"pass": "gptq"},), **more: object) -> Recipe:
    given = {"name": "r", "passes": list(passes), "exports": ["compressed-tensors"], "gpus": gpus, "evaluate": []}
    return parse_recipe(given | {"calibration": {"samples": 1024, "length": 4096}} | more)


def planned(asked: Recipe, *fleet: Seat) -> Plan:
    return make_plan(asked, MODEL, fleet)


def test_a_recipe_without_gpus_is_stored_as_before_and_gets_one():
    plain = recipe(1)
    assert "gpus" not in plain.model_dump(mode="json")
    plan = planned(plain, HOST)
    assert (plan.queue, plan.gpus, plan.gpus_reason) == ("gpu", 1, "")
    assert recipe("auto").model_dump(mode="json")["gpus"] == "auto"


@pytest.mark.parametrize("asked", [0, -1, 65, "two", 1.5])
def test_what_is_no_number_of_gpus_is_refused(asked: object):
    with pytest.raises(NightpressError, match="gpus"):
        recipe(asked)


@pytest.mark.slow
def test_auto_takes_as_many_as_the_largest_host_has_and_the_passes_gain_from():
    plan = planned(recipe(), HOST, replace(HOST, gpus=2))
    assert plan.gpus == 8
    assert "`gpus: auto` comes to 8: it takes about" in plan.gpus_reason
    assert "on one and" in plan.gpus_reason
    assert plan.gpus_reason.endswith("the largest host seen lately has 8.")
    assert planned(recipe(), replace(HOST, gpus=2)).gpus == 2
    assert planned(recipe(), replace(HOST, gpus=3)).gpus == 2, "a power of two"
    assert plan.estimate is not None
    alone = planned(recipe(1), HOST).estimate
    assert alone is not None
    assert plan.estimate.seconds < alone.seconds / 3
    assert plan.estimate.gpu_bytes == alone.gpu_bytes, "each GPU holds no more than one alone"
    assert plan.estimate.memory_bytes > alone.memory_bytes, "each process has its own runtime"


@pytest.mark.slow
def test_auto_comes_to_one_where_more_would_not_help_and_says_why():
    only_streams = recipe(passes=[{"pass": "weight-only"}], device="gpu")
    assert "and it has none" in planned(only_streams, HOST).gpus_reason
    assert "the largest host seen lately has 1 GPU" in planned(recipe(), replace(HOST, gpus=1)).gpus_reason
    assert "no GPU worker has been seen lately" in planned(recipe()).gpus_reason
    quick = recipe(calibration={"samples": 16, "length": 128}, device="gpu")
    assert " would save " in planned(quick, HOST).gpus_reason
    small_host = replace(HOST, memory=10 * GB)
    assert "no host with 2 seen lately has the memory" in planned(recipe(device="gpu"), small_host).gpus_reason
    for asked, fleet in ((only_streams, [HOST]), (recipe(), []), (quick, [HOST])):
        assert planned(asked, *fleet).gpus == 1


def test_a_number_is_kept_and_the_plan_says_what_the_job_waits_for():
    plan = planned(recipe(16), HOST)
    assert (plan.queue, plan.gpus, plan.queue_reason) == ("gpu", 16, "the recipe asks for several GPUs.")
    waits = "the largest host seen lately has 8, so it waits for a larger one"
    assert plan.gpus_reason == f"`gpus: 16`, as the recipe says; {waits}."
    assert make_plan(recipe(2), None).gpus == 2
    needless = planned(recipe(4, passes=[{"pass": "weight-only"}]), HOST)
    assert any("only speeds up the evaluation" in warning for warning in needless.warnings)


def test_a_number_of_gpus_and_a_processor_exclude_each_other():
    with pytest.raises(NightpressError, match="`device: cpu` has no 2 GPUs"):
        planned(recipe(2, device="cpu"), HOST)
    with pytest.raises(NightpressError, match="runs on a CPU only"):
        make_plan(parse_recipe({"name": "r", "passes": [{"pass": "dynamic-int8"}], "exports": ["onnx"], "gpus": 2}))


@pytest.mark.parametrize(
    ("spread_s", "gpus"),
    [(3600.0, 8), (1500.0, 4), (700.0, 2), (600.0, 1), (0.0, 1)],
)
def test_twice_as_many_must_save_five_minutes_and_a_quarter(spread_s: float, gpus: int):
    time = Spread(spread_s, spread_s, ("gptq",))
    assert count_gpus("auto", time, lambda _: Need(GB, GB, 0), (HOST,)).gpus == gpus


def test_two_gpus_are_taken_to_be_less_than_twice_as_fast():
    assert Spread(1850.0, 1850.0, ("gptq",)).on(2) == pytest.approx(1000.0)
    assert Spread(2850.0, 1850.0, ("gptq",)).on(2) == pytest.approx(2000.0), "the rest is no faster"
    assert count_gpus(3, Spread(1, 1, ()), lambda _: Need(0, 0, 0), ()) == GpuCount(3, "`gpus: 3`, as the recipe says.")
