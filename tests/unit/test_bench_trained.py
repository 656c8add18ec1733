"""Models of benches travel as what differs from their source, and are restored."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.trained import ship, unship


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.slow
def test_a_model_is_restored_from_what_differs(rows: bool, tmp_path: Path):
    torch.manual_seed(0)
    before = {"table": torch.randn(50, 8), "matrix": torch.randn(6, 8), "bias": torch.randn(6), "same": torch.randn(4)}
    after = before | {"table": before["table"].clone(), "matrix": torch.randn(3, 8), "bias": torch.randn(6)}
    after["table"][7] += 0.01 * torch.randn(8)
    for name, tensors in (("source", before), ("made", after)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(f'{{"of": "{name}"}}')
    ship(tmp_path / "source", tmp_path / "made", tmp_path / "shipped", rows=rows)
    unship(tmp_path / "source", tmp_path / "shipped", tmp_path / "restored")
    restored = load_file(tmp_path / "restored" / "model.safetensors")
    assert restored.keys() == after.keys()
    for name, tensor in after.items():
        assert restored[name].float() == pytest.approx(tensor, abs=2e-3)
    assert (tmp_path / "restored" / "config.json").read_text() == (tmp_path / "made" / "config.json").read_text()
    if rows:  # all rows but one are the source's, and this one is near
        assert torch.equal(restored["table"][:7], before["table"][:7])
        assert restored["table"][7] == pytest.approx(after["table"][7], abs=3e-4)
