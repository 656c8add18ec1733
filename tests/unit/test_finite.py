"""Weights that are not finite are found, whoever of several readers comes to them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nightpress.core.compress.evaluate import finite
from nightpress.core.compress.evaluate.finite import check_weights
from nightpress.core.errors import ErrorCode, NightpressError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(
    threads: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(finite, "_CHUNK", 64)
    monkeypatch.setattr(finite, "_PIECE", 256)
    weights = {f"layer.{at}.weight": torch.full((7, 13), torch.finfo(dtype).max, dtype=dtype) for at in range(4)}
    weights |= {"empty": torch.empty(0, dtype=dtype), "codes": torch.full((9,), -1, dtype=torch.int16)}
    for place in (0, 1, 45, 89, 90):
        for value in (float("inf"), float("-inf"), float("nan")):
            wrong = weights["layer.2.weight"].clone()
            wrong.view(-1)[place] = value
            save_file({**weights, "layer.2.weight": wrong}, tmp_path / "model.safetensors")
            with pytest.raises(NightpressError) as refused:
                check_weights(tmp_path, threads)
            assert refused.value.code == ErrorCode.NUMERICAL_FAILURE
            assert refused.value.details["tensors"] == ["layer.2.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    check_weights(tmp_path, threads)
