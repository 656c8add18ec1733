"""Searches within a gate: bisection, the order of upgrades, and what the options allow."""

from pathlib import Path
from typing import Any

import pytest

from nightpress.core.compress.context import Judged, PassContext
from nightpress.core.compress.passes.within import Candidate, Search, bisect
from nightpress.core.compress.solvers.upgrades import upgrades
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.checkpoints import prefix_digests
from nightpress.core.handoff.report import GateResult
from nightpress.core.handoff.source_outputs import source_digest
from nightpress.core.recipes.gates import parse_gate
from nightpress.core.recipes.models import Quality, parse_recipe
from nightpress.core.recipes.passes import Channels, Gptq, Heads, Layers, StaticInt8
from nightpress.core.recipes.plan import make_plan
from tests.headers import decoder, encoder

BERT = encoder(256, 4, 4)
LLAMA = decoder(512, 1408, 8, 4, 3, vocabulary=1000)


@pytest.mark.parametrize("last", [0, 1, 2, 3, 7, 100])
@pytest.mark.parametrize("first", [None, 0])
@pytest.mark.parametrize("sure", [False, True])
def test_bisection_finds_the_first_step_that_keeps_the_gate(last: int, first: int | None, sure: bool):
    for bound in range(last + 2):
        asked: list[int] = []

        def keeps(step: int, bound: int = bound, asked: list[int] = asked) -> bool:
            asked.append(step)
            return step >= bound

        found = bisect(last, keeps, first=first, sure=sure)
        assert found == (min(bound, last), bound <= last or sure)
        assert len(asked) == len(set(asked)) <= 2 + last.bit_length()
        assert not (sure and last in asked)


def test_upgrades_come_in_the_order_of_what_they_gain_for_their_bytes():
    sizes = [[10, 20, 40], [10, 20, 40], [10, 20, 40]]
    errors = [[8.0, 2.0, 1.0], [8.0, 7.0, 0.0], [0.1, 0.0, 0.0]]
    # The second item's middle option is above the line between its neighbours: it is left out.
    assert upgrades(sizes, errors) == [(0, 1), (1, 2), (0, 2), (2, 1), (2, 2)]


def test_upgrades_take_options_in_any_order_and_put_harmful_ones_last():
    assert upgrades([[40, 10], [10, 30]], [[1.0, 2.0], [1.0, 3.0]]) == [(0, 0), (1, 1)]


class Scores:
    """Judges made-up results. Figures are (value, lower end) by the number in a candidate's file."""

    gate, data, examples, note = "accuracy >= -1%", ("mine",), 500, ""

    def __init__(self, figures: list[tuple[float, float]]) -> None:
        self.figures, self.asked = figures, list[int]()

    def make(self, step: int) -> Candidate:
        self.asked.append(step)
        value, low = self.figures[step]
        return Candidate(100 + step, Judged(self._result(low), self._result(value)))

    def _result(self, observed: float) -> GateResult:
        return GateResult(
            gate=self.gate, artifact="candidate", observed=observed, passed=observed >= -0.01, explanation=""
        )

    def model(self, folder: Path) -> Judged:
        raise AssertionError(folder)

    graph = model


def _search(work: Path, judge: Scores, said: list[str] | None = None, **changed: Any) -> Search:
    context = PassContext(
        header=BERT, work_dir=work, judge=judge, checkpoint=lambda path, _step: said.append(path) if said else None
    )
    steps = [f"step {at}" for at in range(len(judge.figures))]
    return Search(Gptq(within=judge.gate, **changed), steps, context, work / "within-0.json")


def test_a_search_tells_what_it_tried_what_it_chose_and_what_was_beyond(tmp_path: Path):
    said = ["first"]
    judge = Scores([(-0.05, -0.06), (-0.02, -0.03), (-0.005, -0.02), (0.0, -0.004), (0.0, 0.0)])
    search = _search(tmp_path, judge, said)
    step, kept = search.run(judge.make, first=0)
    found = search.outcome(step, kept=kept)
    assert (step, kept, found.chosen) == (3, True, "step 3")
    assert found.beyond is not None
    assert found.beyond.what == "step 2"
    assert [tried.what for tried in found.tried] == [f"step {at}" for at in judge.asked]
    assert [(tried.value, tried.observed, tried.size_bytes) for tried in found.tried] == [
        (*judge.figures[at], 100 + at) for at in judge.asked
    ]
    assert said == ["first", *["within-0.json"] * len(judge.asked)]
    [unsure] = search.warnings(kept=kept)
    assert "1 of the" in unsure
    assert "500 examples are few" in unsure


def test_a_search_that_was_killed_measures_nothing_twice(tmp_path: Path):
    figures = [(-0.02 + 0.001 * at, -0.02 + 0.001 * at) for at in range(40)]
    whole = Scores(figures)
    (tmp_path / "whole").mkdir()
    expected = _search(tmp_path / "whole", whole).run(whole.make, first=0)
    killed = Scores(figures)

    def make(step: int) -> Candidate:
        if len(killed.asked) == 3:
            raise KeyboardInterrupt
        return killed.make(step)

    with pytest.raises(KeyboardInterrupt):
        _search(tmp_path, killed).run(make, first=0)
    again = Scores(figures)
    search = _search(tmp_path, again)
    assert search.run(again.make, first=0) == expected
    assert killed.asked + again.asked == whole.asked
    assert len(search.outcome(10, kept=True).tried) == len(whole.asked)
    other = Scores(figures)  # other options: their candidates are others
    _search(tmp_path, other, damping=0.5).run(other.make, first=0)
    assert other.asked == whole.asked


def test_where_nothing_keeps_the_gate_the_nearest_is_chosen_and_of_equals_the_smallest(tmp_path: Path):
    judge = Scores([(-0.02, -0.03), (-0.02, -0.04), (-0.02, -0.03)])
    search = _search(tmp_path, judge)
    step, kept = search.run(judge.make, first=0)
    assert (step, kept) == (0, False)
    found = search.outcome(step, kept=kept)
    assert (found.kept, found.beyond) == (False, None)
    assert "none of the 3 results" in search.warnings(kept=kept)[0]


def _recipe(*passes: dict[str, Any], **more: Any) -> Any:
    return parse_recipe({"name": "t", "passes": list(passes), "exports": ["onnx"], **more})


def test_data_that_chooses_is_not_the_data_that_judges():
    evaluate = [{"metric": "auto", "data": "mine"}, {"metric": "auto", "data": "other", "part": "choose"}]
    recipe = _recipe({"pass": "static-int8", "within": "accuracy >=  -1%"}, evaluate=evaluate)
    assert [entry.part for entry in recipe.evaluate if isinstance(entry, Quality)] == ["judge", "choose"]
    assert recipe.passes[0].within == "accuracy >= -1%"
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    plain = _recipe({"pass": "static-int8"}, evaluate=evaluate)
    assert [entry.part for entry in plain.evaluate if isinstance(entry, Quality)] == ["all", "choose"]
    assert "within" not in plain.model_dump_json()


def test_results_of_a_search_are_shared_only_with_the_same_evaluation():
    def digests(recipe: Any, **data: str) -> list[str]:
        return prefix_digests(recipe, tenant_id="t", model_digest="m", data=data, device="cpu", engine="1")

    searched, plain = {"pass": "channels", "within": "accuracy >= -1%"}, {"pass": "channels"}
    few, many = ({"evaluate": [{"data": "mine", "samples": count}]} for count in (8, 16))
    assert digests(_recipe(searched, **few))[0] != digests(_recipe(searched, **many))[0]
    assert digests(_recipe(searched, **few), mine="a")[0] != digests(_recipe(searched, **few), mine="b")[0]
    assert digests(_recipe(plain, **few), mine="a") == digests(_recipe(plain, **many), mine="b")
    # A pass before the search does not depend on it.
    assert digests(_recipe(plain, searched, **few))[0] == digests(_recipe(plain, searched, **many))[0]


def test_a_sources_outputs_with_the_choosing_half_are_kept_apart():
    def digest(recipe: Any) -> str:
        return source_digest(recipe, tenant_id="t", model_digest="m", data={}, device="cpu", engine="1")

    judge = [{"data": "mine", "part": "judge"}]
    assert digest(_recipe({"pass": "channels"}, evaluate=judge)) != digest(
        _recipe({"pass": "channels", "within": "accuracy >= -1%"}, evaluate=judge)
    )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"pass": "gptq", "within": "size <= 50%"}, "no figure of quality"),
        ({"pass": "gptq", "within": "better"}, "is not a gate"),
        ({"pass": "gptq", "within": "accuracy >= -1%", "budget": 4.5}, "both choose the bits"),
        ({"pass": "gptq", "within": "accuracy >= -1%", "symmetric": False}, "`within`"),
        ({"pass": "static-int8", "within": "accuracy >= -1%", "min_cosine": 0.99}, "both say which layers"),
        ({"pass": "layers", "within": "accuracy >= -1%", "remove": [1]}, "leave one out"),
    ],
)
def test_options_that_contradict_a_search_are_refused(options: dict[str, Any], why: str):
    with pytest.raises(NightpressError) as caught:
        _recipe(options)
    assert why in str(caught.value.details)


def test_a_plan_refuses_a_search_that_nothing_measures():
    recipe = _recipe({"pass": "channels", "within": "accuracy >= -1%"}, evaluate=[{"metric": "latency"}])
    with pytest.raises(NightpressError, match="measures quality"):
        make_plan(recipe, BERT)


def test_the_passes_behind_a_search_must_take_each_of_its_results():
    quantized = {"pass": "gptq", "group_size": 128}

    def plan(multiple: int) -> None:
        recipe = parse_recipe(
            {
                "name": "t",
                "passes": [{"pass": "channels", "multiple": multiple, "within": "perplexity <= +3%"}, quantized],
                "exports": ["compressed-tensors"],
            }
        )
        make_plan(recipe, LLAMA)

    plan(128)
    with pytest.raises(NightpressError, match="group_size"):
        plan(32)


def test_the_choices_of_a_search_go_from_the_smallest_result_to_the_largest():
    header = BERT
    for options in (
        Channels(within="accuracy >= -1%"),
        Heads(within="accuracy >= -1%"),
        Layers(within="accuracy >= -1%"),
    ):
        choices = options.choices(header)
        sizes = [choice.leaves(header).size for choice in choices]
        assert sizes == sorted(set(sizes))
        assert sizes[-1] < header.size
        assert all(choice.within is None for choice in choices)
        assert options.leaves(header) == header
        assert options.tries(header) == 1 + len(choices).bit_length()
    assert max(choice.share for choice in Channels(within="accuracy >= -1%", share=0.5).choices(header)) == 0.5
    assert [choice.count for choice in Layers(within="accuracy >= -1%", count=1).choices(header)] == [1]


def test_a_search_is_in_the_estimate():
    header = BERT
    for name in ("static-int8", "channels", "gptq"):
        plain, searched = (
            make_plan(_recipe({"pass": name} | more, evaluate=[{"metric": "auto", "samples": 64}]), header).estimate
            for more in ({}, {"within": "top1_agreement >= 0.99"})
        )
        assert plain is not None
        assert searched is not None
        assert searched.seconds > 1.5 * plain.seconds


def test_a_gate_of_a_search_is_read_as_elsewhere():
    assert StaticInt8(within="accuracy >= -1%").gate_within == parse_gate("accuracy", ">= -1%")
