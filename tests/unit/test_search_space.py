"""Search spaces: what a choice and a range may stand for, and which recipes come out."""

from typing import Any

import pytest

from nightpress.core.compress.data.halves import RUN, half
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.gates import read_gate
from nightpress.core.recipes.search.space import Choice, Range, Space, digest_of

SHRINK = {"choice": [None, {"pass": "layers", "count": {"choice": [1, 2]}}, [{"pass": "heads"}, {"pass": "recover"}]]}
RECIPES: list[dict[str, Any]] = [
    {
        "name": "first",
        "passes": [SHRINK, {"pass": "gptq", "bits": {"choice": [3, 4, 8], "start": 4}, "group_size": None}],
        "exports": [{"format": "gguf", "type": {"choice": ["q8_0", "q4_0"]}}],
    },
    {"name": "second", "passes": [{"pass": "channels", "share": {"range": [0.1, 0.5]}}], "exports": ["onnx"]},
]


def test_a_point_of_a_space_is_a_recipe():
    space = Space(RECIPES)
    point = {"recipe": 0, "0.passes.0": 1, "0.passes.0=1.count": 1, "0.passes.1.bits": 2, "0.exports.0.type": 1}
    assert space.at(point) == {
        "name": "first",
        "passes": [{"pass": "layers", "count": 2}, {"pass": "gptq", "bits": 8, "group_size": None}],
        "exports": [{"format": "gguf", "type": "q4_0"}],
    }
    assert space.holds(point)
    said = space.says(point)
    assert (said["recipe"], said["0.passes.0=1.count"], said["0.passes.1.bits"]) == ("first", 2, 8)


def test_null_leaves_a_pass_out_and_a_list_stands_for_several():
    space = Space(RECIPES)
    rest = {"recipe": 0, "0.passes.1.bits": 0, "0.exports.0.type": 0}
    without = space.at({**rest, "0.passes.0": 0})
    assert [step["pass"] for step in without["passes"]] == ["gptq"]
    assert without["passes"][0]["group_size"] is None  # a fixed null stays
    several = space.at({**rest, "0.passes.0": 2})
    assert [step["pass"] for step in several["passes"]] == ["heads", "recover", "gptq"]


def test_only_the_parameters_of_the_chosen_options_are_asked_for():
    space = Space(RECIPES)
    assert space.domains({"recipe": 1, "1.passes.0.share": 0.25}) == {
        "recipe": Choice((0, 1)),
        "1.passes.0.share": Range(0.1, 0.5, start=0.1),
    }
    assert not space.holds({"recipe": 1})
    assert not space.holds({"recipe": 7})
    assert not space.holds({"recipe": 1, "1.passes.0.share": 0.25, "0.passes.0": 0})


def test_a_study_starts_where_each_recipe_says():
    assert Space(RECIPES).starts() == [
        {"recipe": 0, "0.passes.0": 0, "0.passes.1.bits": 1, "0.exports.0.type": 0},
        {"recipe": 1, "1.passes.0.share": 0.1},
    ]
    assert Space(RECIPES[1:]).starts() == [{"0.passes.0.share": 0.1}]


def test_rising_numbers_are_ordered_and_names_are_not():
    assert Choice((3, 4, 8)).ordered
    assert not Choice((8, 4)).ordered
    assert not Choice((True, False)).ordered
    assert not Choice((32, None)).ordered
    assert Range(1, 4).whole
    assert not Range(1, 4, step=0.5).whole


@pytest.mark.parametrize(
    "wrong",
    [
        {"choice": []},
        {"choice": "4"},
        {"choice": [4], "also": 1},
        {"choice": [4, 8], "start": 5},
        {"range": [1]},
        {"range": [2, 1]},
        {"range": [1, "2"]},
        {"range": [1, 2], "step": 0},
        {"range": [0, 2], "log": True},
        {"range": [1, 2], "start": 3},
        {"range": [1, float("inf")]},
        {"range": [0, 10**400]},
        {"range": [1, float("nan")]},
    ],
)
def test_what_is_no_choice_and_no_range_is_refused_with_its_place(wrong: dict[str, Any]):
    with pytest.raises(NightpressError) as refused:
        Space([{"passes": [{"pass": "gptq", "bits": wrong}], "exports": ["onnx"]}])
    assert refused.value.code is ErrorCode.INVALID_RECIPE
    assert refused.value.message.startswith("space.0.passes.0.bits: ")


def test_a_digest_tells_what_is_pressed_and_not_how_it_is_measured():
    recipe = {"name": "a", "passes": [1], "exports": ["x"], "evaluate": [], "gates": {}, "seed": 0}
    assert digest_of(recipe) == digest_of({**recipe, "name": "b", "evaluate": [1], "gates": {"size": "<= 1%"}})
    assert len({digest_of({**recipe, key: [2]}) for key in ("passes", "exports", "seed")} | {digest_of(recipe)}) == 4


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("perplexity <= +1%", ("perplexity", "<= +1%")),
        ("accuracy>=-1%", ("accuracy", ">=-1%")),
        ("  size < 35% ", ("size", "< 35%")),
    ],
)
def test_a_gate_is_read_as_people_write_it(text: str, gate: tuple[str, str]):
    assert read_gate(text) == gate


@pytest.mark.parametrize("text", ["perplexity", "beauty >= 1", "perplexity <= little", "<= 1%", ""])
def test_what_is_no_gate_is_refused(text: str):
    with pytest.raises(ValueError, match=r".+"):
        read_gate(text)


@pytest.mark.parametrize("run", [1, RUN])
@pytest.mark.parametrize("rows", [2, 3, 9, 100, 1001])
def test_halves_share_no_row_and_lose_none(rows: int, run: int):
    data = list(range(rows))
    chosen, judged = (half(data, part, ref="d", run=run) for part in ("choose", "judge"))
    assert sorted(chosen + judged) == data
    assert chosen == sorted(chosen)
    assert judged == sorted(judged)
    assert judged
    assert abs(len(chosen) - len(judged)) <= 2 * run
    assert half(data, "all", ref="d", run=run) == data


def test_a_single_row_has_no_halves():
    with pytest.raises(NightpressError) as refused:
        half(["row"], "judge", ref="mine", run=RUN)
    assert refused.value.code is ErrorCode.INVALID_DATA
