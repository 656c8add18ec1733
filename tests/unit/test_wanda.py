"""Wanda's scores and masks."""

import torch

from nightpress.core.compress.solvers.wanda import Power, wanda_mask


def test_a_large_weight_on_a_silent_input_goes_before_a_small_one_on_a_loud_input():
    weight, power = torch.tensor([[5.0, 1.0, -2.0, 0.5]]), torch.tensor([0.01, 4.0, 1.0, 100.0])
    assert wanda_mask(weight, power, 0.25).tolist() == [[True, False, False, False]]  # scores 0.5, 2, 2, 5


def test_each_row_loses_its_share_and_each_group_its_pattern():
    weight, power = torch.randn(7, 96), torch.rand(96)
    assert (wanda_mask(weight, power, 0.3).sum(1) == round(0.3 * 96)).all()
    for kept, of in [(2, 4), (1, 4), (4, 8), (3, 16)]:
        gone = wanda_mask(weight, power, 1 - kept / of, (kept, of)).view(7, -1, of)
        assert (gone.sum(2) == of - kept).all()
        score = (weight.abs() * power.sqrt()).view(7, -1, of)
        assert (score.masked_fill(~gone, 0).amax(2) <= score.masked_fill(gone, torch.inf).amin(2)).all()
    assert (wanda_mask(torch.zeros(2, 8), torch.ones(8), 0.5, (2, 4)).view(2, 2, 4).sum(2) == 2).all()


def test_power_adds_up_over_batches():
    inputs = torch.randn(2, 5, 8)
    power = Power(8, "cpu")
    power.add(inputs[0].bfloat16())
    power.add(inputs[1].bfloat16())
    torch.testing.assert_close(power.sum, inputs.bfloat16().float().square().sum((0, 1)))
    assert power.tokens == 10
