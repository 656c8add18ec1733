"""The estimated memory of a calibrated pass, from a model's header alone."""

import math

import pytest

from nightpress.core.recipes.block_peak import stack_size
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import blocks_cost, learning_cost, pinned_bytes, reads_ahead
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from tests.headers import decoder, mixture

_WIDTH, _INNER = 256, 1024
_TEXT = Calibration(samples=8, length=64)


def _tensor(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name=name, dtype="BF16", shape=shape, size=2 * math.prod(shape))


def _mixture(experts: int, model_type: str = "olmoe") -> ModelHeader:
    return ModelHeader(
        model_type=model_type,
        architecture="OlmoeForCausalLM",
        config={"vocab_size": 100, "hidden_size": _WIDTH, "num_experts": experts, "num_experts_per_tok": 2},
        tensors=tuple(
            tensor
            for expert in range(experts)
            for inside in (f"mlp.experts.{expert}" if experts > 1 else "mlp",)
            for tensor in (
                _tensor(f"model.layers.0.{inside}.gate_proj.weight", _INNER, _WIDTH),
                _tensor(f"model.layers.0.{inside}.up_proj.weight", _INNER, _WIDTH),
                _tensor(f"model.layers.0.{inside}.down_proj.weight", _WIDTH, _INNER),
            )
        ),
        has_tokenizer=True,
    )


def test_the_gram_matrices_of_all_experts_are_held_at_once():
    few, many = (blocks_cost(_mixture(experts), _TEXT) for experts in (4, 20))
    weights, grams = 3 * _INNER * _WIDTH, _WIDTH**2 + _INNER**2
    # a block in float32 twice (to compute with, and as the result) and once in its stored dtype
    assert many.memory_bytes - few.memory_bytes == 16 * (2 * 4 * weights + 2 * weights + 4 * grams)
    # on a GPU: the block in its stored dtype, the Gram matrices, its new weights, and the block before until it is written;
    # and the largest Gram matrices four times, since all experts' are stacked and factorized at once
    assert many.gpu_bytes - few.gpu_bytes == 16 * (2 * weights + 4 * grams + 2 * weights + 2 * weights + 16 * _INNER**2)


def test_parts_hold_neither_all_settled_weights_nor_all_gram_matrices():
    few, many = (blocks_cost(_mixture(experts), _TEXT, bits=4, in_parts=True) for experts in (4, 20))
    weights = 3 * _INNER * _WIDTH
    # A block in float32, as stored, and its codes: the weights that are settled leave the copy as stored.
    grams = 4 * (_WIDTH**2 + _INNER**2)
    assert many.memory_bytes - few.memory_bytes == 16 * (4 * weights + 2 * weights + weights // 2 + grams)
    # On a GPU: the block as stored, the codes of the block before, and those of this block so far. The peak is at the first part of the
    # down projections, when the other inputs' Gram matrices are gone. All down projections are settled at once.
    down, copies = 4 * _INNER**2, 30 * _INNER * _WIDTH
    settled = 2 * _INNER * _WIDTH // 2
    stacked = max(3 * down, copies + down) + down
    assert many.gpu_bytes - few.gpu_bytes == 16 * (2 * weights + weights // 2 + down + settled + stacked)


def test_blocks_are_read_ahead_only_if_they_are_small():
    gib = 1024**3
    assert pinned_bytes([[3 * gib, 1], [3 * gib, 3 * gib - 5], [gib]]) == 2 * 4 * gib + gib + 1
    assert reads_ahead(5 * gib)
    assert not reads_ahead(6 * gib)
    small, large = (mixture(7168, 2048, experts=count, chosen=8, layers=2, vocabulary=100) for count in (32, 256))
    first, second = (blocks_cost(header, _TEXT).host_bytes or 0 for header in (small, large))
    assert second < 3 * first, "eight times the experts, but one block in place of three"


def test_experts_are_stacked_only_as_far_as_memory_is_set_aside():
    assert stack_size(1536, 2048, 1) == 1
    assert 8 <= stack_size(1536, 2048, 64) <= 16
    assert stack_size(2 * 28672, 8192, 64) == 1


def test_an_expert_is_multiplied_by_the_tokens_that_come_to_it():
    few, many = (blocks_cost(_mixture(experts), _TEXT) for experts in (4, 20))
    solving = 16 * 3 * (_INNER * _WIDTH**2 + _WIDTH * _INNER**2 // 2 + _WIDTH**3 // 3 + _INNER**3 // 3)
    # Each token goes to two experts, whatever their number.
    assert many.work - few.work == pytest.approx(solving, rel=1e-6)


def test_a_pass_that_scales_weights_in_float32_holds_a_block_more():
    plain, copied = (blocks_cost(_mixture(4), _TEXT, by_group=False, copies=copies) for copies in (False, True))
    # `searched`: the matrices behind one norm, in float32. The trials take more, so the upper bound has twice as much.
    block, searched = (4 * 4 * 3 * _INNER * _WIDTH, 4 * 4 * 2 * _INNER * _WIDTH)
    assert block + searched <= copied.memory_bytes - plain.memory_bytes < block + 2 * searched


def test_what_waits_for_all_inputs_of_a_block_holds_their_gram_matrices_together():
    dense = _mixture(1, model_type="llama")
    text = Calibration(samples=1, length=8)
    in_turn, at_once = (blocks_cost(dense, text, by_group=by_group) for by_group in (True, False))
    assert at_once.memory_bytes > in_turn.memory_bytes + 4 * _WIDTH**2


def test_learning_holds_both_models_hidden_states_and_works_for_each_step():
    header = _mixture(4, "llama")
    few, many = (learning_cost(header, _TEXT, bits=4, steps=steps, batch=4) for steps in (100, 200))
    weights = 4 * 3 * _INNER * _WIDTH
    # A step of 4 × 64 tokens: a forward pass, and twice that for gradients.
    assert many.work - few.work > 100 * 3 * 4 * 64 * weights / 2  # of four experts, a token takes two
    assert many.memory_bytes == few.memory_bytes
    plain = blocks_cost(header, _TEXT, bits=4, by_group=False)
    assert few.memory_bytes > plain.memory_bytes
    assert few.gpu_bytes >= plain.gpu_bytes
    longer = learning_cost(header, Calibration(samples=800, length=64), bits=4, steps=100, batch=4)
    tokens = (800 - 8) * 64
    assert longer.memory_bytes - few.memory_bytes == pytest.approx(2 * 4 * tokens * _WIDTH, rel=0.05)
    dense = _mixture(1, "llama")  # the searches among a mixture's experts take more of a GPU than its steps
    learned = learning_cost(dense, _TEXT, bits=4, steps=100, batch=4)
    assert learned.gpu_bytes > blocks_cost(dense, _TEXT, bits=4, by_group=False).gpu_bytes


@pytest.mark.parametrize("vocabulary", [32_000, 262_144])
def test_the_logits_of_one_text_over_a_large_vocabulary_are_counted(vocabulary: int) -> None:
    """A batch has one text at least, and 2,048 tokens over 262,144 words take 2 GiB."""
    header = decoder(256, 512, 4, 4, 2, vocabulary=vocabulary)

    def needed(length: int) -> int:
        evaluate = [{"metric": "perplexity", "samples": 2, "length": length}]
        recipe = {"name": "r", "passes": [{"pass": "weight-only"}], "exports": ["compressed-tensors"]}
        estimate = make_plan(parse_recipe({**recipe, "evaluate": evaluate}), header).estimate
        assert estimate is not None
        return estimate.memory_bytes

    assert needed(2048) - needed(16) >= 2 * 4 * vocabulary * (2048 - 16)
