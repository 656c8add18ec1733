"""A budget for mixed precision, in bits per weight or as a size of the whole model, checked with the header before anything runs."""

import re
from typing import Any

import pytest

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import Plan, make_plan

_ROWS, _WIDTH = 1000, 256


def _tensor(name: str, *shape: int) -> TensorInfo:
    count = 1
    for size in shape:
        count *= size
    return TensorInfo(name=name, dtype="F32", shape=shape, size=4 * count)


#: Half of its 2,072,576 bytes are embeddings and norms, whose size does not depend on the layers' bits.
HEADER = ModelHeader(
    model_type="llama",
    architecture="LlamaForCausalLM",
    config={"vocab_size": _ROWS, "hidden_size": _WIDTH},
    tensors=(
        _tensor("model.embed_tokens.weight", _ROWS, _WIDTH),
        _tensor("model.norm.weight", _WIDTH),
        *(_tensor(f"model.layers.0.self_attn.{letter}_proj.weight", _WIDTH, _WIDTH) for letter in "qkvo"),
    ),
    has_tokenizer=True,
)
KEPT = 4 * (_ROWS * _WIDTH + _WIDTH)
LAYERS = 4 * _WIDTH * _WIDTH


def _plan(budget: object, name: str = "gptq") -> Plan:
    pass_: dict[str, Any] = {"pass": name, "group_size": 64, "symmetric": True, "budget": budget}
    return make_plan(parse_recipe({"name": "r", "passes": [pass_], "exports": ["compressed-tensors"]}), HEADER)


def _planned(budget: object, name: str = "gptq") -> int:
    estimate = _plan(budget, name).estimate
    assert estimate is not None
    return estimate.output_bytes["compressed-tensors"]


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize("size", ["1.2MB", "1.2 MB", "0.0012GB", f"{100 * 1.2e6 / HEADER.size:.9f}%"])
def test_a_size_is_that_of_all_weights_with_those_that_stay_as_they_are(size: str, name: str):
    assert _planned(size, name) == pytest.approx(1.2e6, abs=8)
    bits = 8 * (1.2e6 - KEPT) / LAYERS
    assert 4 < bits < 8.5
    assert _planned(size, name) == pytest.approx(_planned(bits, name), abs=8)


def test_more_than_the_most_bits_take_is_not_spent():
    assert _planned("5GB") == _planned("100%") == pytest.approx(_planned(8.5), rel=1e-3)


@pytest.mark.parametrize("size", ["1MB", "0%", "30%"])
def test_a_size_below_the_least_is_refused_and_the_least_it_names_is_taken(size: str):
    with pytest.raises(NightpressError, match=r"least it could be.*stay as they are") as caught:
        _plan(size)
    megabytes, share = re.search(r"([\d.]+MB), or ([\d.]+%)", caught.value.message).groups()  # type: ignore[union-attr]
    least = _planned(megabytes)
    assert KEPT < least < 1.02 * _planned(share)
    with pytest.raises(NightpressError):
        _plan(f"{float(megabytes[:-2]) - 0.01:.2f}MB")


@pytest.mark.parametrize("budget", ["small", "35", "-5%", "100kB", 2, 9, 1.5])
def test_what_is_no_budget_is_refused_with_what_one_looks_like(budget: object):
    with pytest.raises(NightpressError, match="nor a size like") as caught:
        _plan(budget)
    assert len(caught.value.details["faults"]) == 1
