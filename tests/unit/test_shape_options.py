"""`shape-to-speed` in recipes: the speeds, the exports for each of them, and what is refused; and the table of times."""

import json
from typing import Any

import pytest

from nightpress.core.compress.passes.latency_table import LatencyTable, table_of
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.models import Recipe, parse_recipe
from nightpress.core.recipes.passes import ShapeToSpeed
from nightpress.core.recipes.plan import make_plan
from tests.headers import decoder, encoder

_ENCODER = encoder(384, 12, 6)


def _recipe(*passes: dict[str, Any], exports: list[str] | None = None) -> Recipe:
    return parse_recipe({"name": "r", "passes": list(passes), "exports": exports or ["openvino"]})


def _shape(**options: Any) -> dict[str, Any]:
    return {"pass": "shape-to-speed", **options}


def test_several_speeds_make_each_export_once_for_each_speed():
    recipe = _recipe(_shape(speeds=[2, 4.5]), exports=["onnx", "openvino"])
    names = ["onnx-2x", "onnx-4.5x", "openvino-2x", "openvino-4.5x"]
    assert [export.name for export in recipe.exports] == names
    stored = recipe.model_dump(mode="json")
    assert stored["exports"][0] == {"format": "onnx", "speed": 2.0}
    assert [export.name for export in parse_recipe(stored).exports] == names
    plan = make_plan(recipe, _ENCODER)
    assert plan.estimate is not None
    assert plan.estimate.output_bytes.keys() == set(names)
    assert [export.name for export in _recipe(_shape(speed=">= 4x")).exports] == ["openvino"]


@pytest.mark.parametrize(
    ("options", "stages"),
    [
        ({"speed": ">= 2x"}, (2,)),
        ({"speed": ">= 4x"}, (2, 4)),
        ({"speed": ">=3x"}, (1.7321, 3)),
        ({"speeds": [2, 4, 8]}, (2, 4, 8)),
        ({"speeds": [1.5, 6]}, (1.5, 3, 6)),
    ],
)
def test_no_stage_makes_the_model_more_than_twice_as_fast(options: dict[str, Any], stages: tuple[float, ...]):
    assert ShapeToSpeed.model_validate(_shape(**options)).stages == pytest.approx(stages)


def test_smaller_steps_train_more_often_and_end_at_the_same_speeds():
    options = ShapeToSpeed.model_validate(_shape(speeds=[2, 8], step=1.5))
    assert options.stages == pytest.approx((2**0.5, 2, 2 * 4**0.25, 4, 4 * 4**0.25, 8), rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"speed": "4x"}, {"speed": ">= 1x"}, {"speed": ">= 1000x"}, {"speeds": [4, 2]}, {"speeds": [2, 2]}, {"speeds": []}]
)  # fmt: skip
def test_what_is_no_speed_is_refused(options: dict[str, Any]):
    with pytest.raises(NightpressError) as error:
        _recipe(_shape(**options))
    assert error.value.code is ErrorCode.INVALID_RECIPE


@pytest.mark.parametrize(
    ("passes", "exports", "said"),
    [
        ([_shape()], ["safetensors"], "layers of differing widths can't be said in a config"),
        ([_shape(type="int8")], ["onnx"], "counts on `static-int8`"),
        ([_shape(speeds=[2, 4]), {"pass": "weight-only"}], ["onnx"], "can't follow several `speeds`"),
        ([_shape(speeds=[2]), {"pass": "static-int8", "within": "cosine >= 0.9"}], ["onnx"], "chooses one graph"),
        ([_shape(relations={})], ["onnx"], "a layer may lose"),
        ([_shape(length=1024)], ["onnx"], "512 positions"),
    ],
)
def test_what_does_not_go_together_is_refused_with_its_reason(passes: list[Any], exports: list[str], said: str):
    with pytest.raises(NightpressError, match=said):
        make_plan(_recipe(*passes, exports=exports), _ENCODER)


def test_models_that_write_text_are_refused():
    with pytest.raises(NightpressError, match="it takes encoders"):
        make_plan(_recipe(_shape()), decoder(768, 2048, 12, 4, 6, vocabulary=32000))


def test_an_export_can_not_name_a_speed_that_nothing_makes():
    with pytest.raises(NightpressError, match="no pass makes"):
        parse_recipe({"name": "r", "passes": [_shape(speeds=[2])], "exports": [{"format": "onnx", "speed": 3}]})


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaForSequenceClassification"),
        ("xlm-roberta", "XLMRobertaForSequenceClassification"),
        ("bert", "BertModel"),
    ],
)
def test_the_recipe_fast_encoder_is_planned_for(model_type: str, architecture: str):
    header = _ENCODER.model_copy(update={"model_type": model_type, "architecture": architecture})
    assert make_plan(get_recipe("fast-encoder"), header).estimate is not None


def test_widths_are_a_grid_and_heads_are_all_counts():
    options = ShapeToSpeed.model_validate(_shape(grid=0.5))
    anatomy = options.anatomy(_ENCODER)
    assert options.head_levels(anatomy) == tuple(range(13))
    assert options.width_levels(anatomy) == (0, 64, 96, 192, 384, 768, 1536)


def _table() -> LatencyTable:
    times = {
        ("source", 0): 20.0,
        ("whole", 0): 10.0,
        ("rest", 0): 1.0,
        ("heads", 1): 3.0,
        ("heads", 2): 2.5,  # measured as faster than one head: noise
        ("heads", 4): 5.0,
        ("widths", 32): 1.5,
        ("widths", 64): 3.0,
    }
    return table_of("here", "int8", 2, times)


def test_the_table_is_exact_for_the_whole_model_and_for_none_of_it_and_never_falls():
    table = _table()
    assert table.estimate([4, 4], [64, 64]) == pytest.approx(10)
    assert table.speed([4, 4], [64, 64]) == pytest.approx(2)
    assert table.estimate([0, 0], [0, 0]) == 1
    for column in (table.heads, table.widths):
        times = [column[count] for count in sorted(column)]
        assert times == sorted(times)
    assert table.estimate([1, 0], [32, 0]) == pytest.approx(1 + 9 / 5.75 * (0.75 + 0.25))
    assert LatencyTable.from_json(table.to_json()) == table


def test_a_width_that_was_fast_by_chance_counts_like_its_neighbours():
    straight = {("heads", count): 1.0 + count for count in range(1, 9)}
    times = {("source", 0): 20.0, ("whole", 0): 9.0, ("rest", 0): 1.0, ("widths", 64): 1.0, **straight}
    assert table_of("here", "int8", 1, times).heads == pytest.approx({0: 0, **{count: count for count in range(1, 9)}})
    chance = table_of("here", "int8", 1, times | {("heads", 4): 4.0}).heads
    assert chance[4] > 3.75
    assert chance[4] - chance[3] > 0.5


def test_a_last_layer_that_was_timed_alone_has_times_of_its_own():
    times = {
        ("source", 0): 20.0,
        ("whole", 0): 15.0,
        ("rest", 0): 1.0,
        ("heads", 2): 1.0 + 2 * 2.0 + 0.5,
        ("heads", 4): 1.0 + 2 * 4.0 + 1.0,
        ("widths", 64): 1.0 + 2 * 2.0 + 1.0,
        ("last_heads", 4): 2.0,
        ("last_widths", 64): 2.0,
    }
    table = table_of("here", "int8", 3, times)
    assert table.estimate([4, 4, 4], [64, 64, 64]) == pytest.approx(15)
    assert table.heads == pytest.approx({0: 0, 2: 2, 4: 4})
    assert table.last_heads == pytest.approx({0: 0, 2: 0.5, 4: 1})
    assert table.estimate([0, 2, 4], [64, 0, 64]) == pytest.approx(1 + 2 + 2 + 1 + 1)
    assert LatencyTable.from_json(table.to_json()) == table


def test_a_table_of_an_earlier_version_has_all_layers_alike():
    earlier = json.loads(_table().to_json())
    del earlier["last_heads"], earlier["last_widths"]
    assert LatencyTable.from_json(json.dumps(earlier)) == _table()
