"""A recipe is checked as a whole before anything runs, and an error names the place of the fault."""

import pytest

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.builtins import builtin_recipes, get_recipe
from nightpress.core.recipes.gates import GATE_METRICS, parse_gate
from nightpress.core.recipes.models import Quality, load_recipe, parse_recipe

GOOD = {"name": "r", "passes": [{"pass": "weight-only", "bits": 4}], "exports": ["compressed-tensors"]}


def test_every_builtin_recipe_is_valid_and_named_like_its_file() -> None:
    assert {"int8-encoder", "int8-weights", "int4-weights", "sparse-half"} <= set(builtin_recipes())


def test_an_unknown_builtin_names_those_there_are() -> None:
    with pytest.raises(NightpressError) as caught:
        get_recipe("int3-magic")
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert "int8-encoder" in caught.value.hint


def test_a_normalised_recipe_reads_back_as_itself() -> None:
    recipe = parse_recipe(GOOD)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert recipe.model_dump(mode="json")["passes"][0]["pass"] == "weight-only"
    assert recipe.passes[0].group_size == 128  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"passes": [{"pass": "shrink-ray"}]}, "passes.0"),
        ({"passes": [{"pass": "weight-only", "bits": 9}]}, "bits"),
        ({"passes": [{"pass": "weight-only", "bitz": 4}]}, "bitz"),
        ({"passes": [{"pass": "magnitude"}] * 21}, "passes"),
        ({"passes": [{"pass": "layers", "remove": [[1]]}]}, "passes.0"),
        ({"passes": [{"pass": "magnitude", "pattern": "4:2"}]}, "passes.0"),
        ({"passes": [{"pass": "magnitude", "pattern": "2:4", "sparsity": 0.9}]}, "passes.0"),
        ({"exports": ["pickle"]}, "exports"),
        ({"exports": ["onnx", "onnx"]}, "exports"),
        ({"exports": [{"format": "gguf", "type": "q9_9"}]}, "exports.0"),
        ({"exports": [{"format": "safetensors", "type": "fp16"}]}, "exports.0"),
        ({"gates": {"size": "small"}}, ""),
        ({"gates": {"beauty": "<= 3"}}, ""),
        ({"evaluate": [{"metric": "latency", "batch": 0}]}, "evaluate"),
        ({"name": "<script>"}, "name"),
        ({"state": "succeeded"}, "state"),
    ],
)
def test_a_fault_is_named_with_its_place(change: dict[str, object], place: str) -> None:
    with pytest.raises(NightpressError) as caught:
        parse_recipe({**GOOD, **change})
    assert caught.value.code is ErrorCode.INVALID_RECIPE
    assert any(place in fault["at"] for fault in caught.value.details["faults"])
    assert caught.value.hint


def test_of_thousands_of_faults_a_hundred_are_listed() -> None:
    with pytest.raises(NightpressError, match="has 5000 faults") as caught:
        parse_recipe({**GOOD, **{f"x{number}": 1 for number in range(5000)}})
    assert len(caught.value.details["faults"]) == 100


def test_yaml_that_is_no_yaml_is_an_invalid_recipe() -> None:
    with pytest.raises(NightpressError, match="not valid YAML"):
        load_recipe("passes: [")


@pytest.mark.parametrize(
    ("bound", "relative", "value"),
    [
        ("<= +3%", "change", 0.03),
        ("<= 35%", "share", 0.35),
        (">= 1.5x", "times", 1.5),
        (">= 0.99", "absolute", 0.99),
        (">= -2%", "change", -0.02),
    ],
)
def test_a_bound_says_what_it_compares_with(bound: str, relative: str, value: float) -> None:
    gate = parse_gate("size", bound)
    assert gate.relative == relative
    assert gate.value == pytest.approx(value)
    assert parse_gate("size", str(gate).removeprefix("size ")) == gate


def test_an_evaluation_may_name_one_batch_or_many() -> None:
    recipe = parse_recipe({**GOOD, "evaluate": [{"metric": "latency", "batch": 4, "length": [16, 32]}]})
    assert recipe.model_dump()["evaluate"][0]["batch"] == (4,)


def test_only_data_sets_that_a_person_brought_are_references() -> None:
    recipe = parse_recipe(
        {**GOOD, "evaluate": [{"metric": "auto", "data": "reviews"}, {"metric": "auto", "data": "builtin:prose"}]}
    )
    assert recipe.data_refs() == {"reviews"}


_NOT_OF_QUALITY = {"size", "memory", "latency", "throughput", "prefill_tokens_per_s", "decode_tokens_per_s"}


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_builtin_recipe_gates_on_a_quality_that_it_measures(name: str):
    recipe = builtin_recipes()[name]
    gates = set(recipe.gates) & (set(GATE_METRICS) - _NOT_OF_QUALITY)
    measured = {evaluation.metric for evaluation in recipe.evaluate if isinstance(evaluation, Quality)}
    assert gates
    # Centred cosine exists for every kind of model. Other figures exist for some, so only recipes that name their metric may gate on them.
    named = {"ranking": {"ndcg", "kendall_tau"}, "retrieval": {"ndcg"}}
    own = set().union(*(named.get(metric, set()) for metric in measured))
    assert gates <= {"centred_cosine"} | own | ({"perplexity"} if measured <= {"perplexity", "auto"} else set())
    assert measured
