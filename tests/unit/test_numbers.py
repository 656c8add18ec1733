"""A numerical failure names the layers in which it occurred, once."""

import pytest
import torch

from nightpress.core.compress.numerical_failures import check_finite, naming
from nightpress.core.compress.solvers.gram import Gram
from nightpress.core.compress.solvers.obs import factorize
from nightpress.core.compress.solvers.smooth import Strengths
from nightpress.core.compress.solvers.units import Moments
from nightpress.core.compress.solvers.wanda import Power
from nightpress.core.errors import ErrorCode, NightpressError

_LAYERS = [f"layers.{at}.q_proj" for at in range(5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["gram", "power", "moments", "strengths", "strengths and gram"])
def test_one_bad_number_among_many_tokens_is_enough(kind: str, bad: float, dtype: torch.dtype):
    statistic = {
        "gram": lambda: Gram(8, "cpu"),
        "power": lambda: Power(8, "cpu"),
        "moments": lambda: Moments(8, torch.device("cpu")),
        "strengths": lambda: Strengths(8, "cpu", gram=False),
        "strengths and gram": lambda: Strengths(8, "cpu", gram=True),
    }[kind]()
    for _ in range(3):
        statistic.add(torch.ones(4, 8, dtype=dtype))
    check_finite(_LAYERS, statistic)
    inputs = torch.ones(4, 8, dtype=dtype)
    inputs[2, 5] = bad
    statistic.add(inputs)
    statistic.add(torch.ones(4, 8, dtype=dtype))
    with pytest.raises(NightpressError, match=r"layers\.0\.q_proj, .* and 2 more") as caught:
        check_finite(_LAYERS, statistic)
    assert caught.value.code is ErrorCode.NUMERICAL_FAILURE
    assert caught.value.details["layers"] == _LAYERS


def test_a_solvers_failure_is_told_where_it_was():
    with pytest.raises(NightpressError, match=r"^layers\.0\.q_proj: ") as caught, naming(_LAYERS[:1]):
        factorize(-torch.eye(4) * 1e6)
    assert caught.value.details["layers"] == _LAYERS[:1]
    assert "damping" in caught.value.hint


def test_other_errors_pass_as_they_are():
    error = NightpressError(ErrorCode.DISK_FULL, "full")
    with pytest.raises(NightpressError) as caught, naming(_LAYERS):
        raise error
    assert caught.value is error
