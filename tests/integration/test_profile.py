"""A model's parameters, bytes and FLOPs, computed from its header, equal those that torch counts while it runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from nightpress.client.cli.main import app
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.roofline import probe
from nightpress.core.errors import NightpressError
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.profile import Device, by_kind, profile_of
from tests.integration.test_shrink import _SHRINKING, _model
from tests.press import lay_out, press


@pytest.mark.parametrize("class_name", [name for name in _SHRINKING if name != "DebertaV2ForMaskedLM"])
def test_operations_are_those_that_torch_counts(class_name: str, tmp_path: Path):
    folder = _model(class_name, tmp_path / "m")
    header = inspect_model(FolderFiles(folder))
    model = load_model(folder, header, attention="eager")
    ids = torch.randint(5, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    counted: dict[str, Any] = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    found = profile_of(header, "m", [(3, 20)])
    # torch also counts the rotary angles, positions × frequencies, as a matrix product with inner size 1.
    assert found.shapes[0].flops == pytest.approx(sum(counted.values()), rel=0.01)
    assert sum(part.parameters for part in found.parts) == header.parameters
    assert sum(part.bytes for part in found.parts) == header.size
    blocks = {part.block for part in found.parts} - {None}
    assert blocks == set(range(3))


def test_attention_grows_with_the_square_of_the_length_and_the_rest_does_not(tmp_path: Path):
    header = inspect_model(FolderFiles(_model("LlamaForCausalLM", tmp_path / "m")))
    shapes = [(1, 64), (1, 128), (2, 64)]
    found = profile_of(header, "m", shapes)
    quadratic = [shape.attention_share * shape.flops for shape in found.shapes]
    rest = [shape.flops - part for shape, part in zip(found.shapes, quadratic, strict=True)]
    assert quadratic[1] == pytest.approx(4 * quadratic[0])
    assert quadratic[2] == pytest.approx(2 * quadratic[0])
    assert rest[1] == pytest.approx(2 * rest[0])
    # two key and value heads of 8, three blocks, fp32, keys and values
    assert [shape.cache_bytes for shape in found.shapes] == [2 * 4 * 2 * 8 * 3 * tokens for tokens in (64, 128, 128)]
    at_half = profile_of(header, "m", [(1, found.quadratic_from or 0)])
    kinds = by_kind(at_half)
    linear = kinds["attention projections"].flops + kinds["feed-forward"].flops
    assert kinds["attention scores"].flops == pytest.approx(linear, rel=0.05)


def test_a_roofline_is_the_slower_of_operations_and_bytes(tmp_path: Path):
    header = inspect_model(FolderFiles(_model("LlamaForCausalLM", tmp_path / "m")))
    quick, wide = (
        Device(name="q", flops_per_s=1e6, bytes_per_s=1e12),
        Device(name="w", flops_per_s=1e15, bytes_per_s=1e6),
    )
    (busy,), (starved,) = (profile_of(header, "m", [(4, 64)], machine).shapes for machine in (quick, wide))
    assert (busy.limit, starved.limit) == ("compute", "memory")
    assert busy.bound_ms == pytest.approx(busy.flops / 1e3)
    assert starved.bound_ms == pytest.approx(starved.moved_bytes / 1e3)
    assert starved.decode_bound_ms == pytest.approx((starved.decode_moved_bytes or 0) / 1e3)


@pytest.mark.slow
def test_the_probe_measures_a_plausible_machine():
    device = probe("cpu", 1)
    assert 1e9 < device.flops_per_s < 1e13
    assert 1e8 < device.bytes_per_s < 1e12


@pytest.mark.slow
def test_a_job_reports_both_models(bert_tiny: Path, tmp_path: Path):
    recipe = {
        "passes": [{"pass": "channels", "share": 0.5}, {"pass": "profile", "length": [16, 64], "device": "h100"}],
        "exports": ["safetensors"],
        "calibration": {"samples": 4, "length": 32},
        "evaluate": [],
    }
    _, report, _ = press(lay_out(tmp_path / "job", bert_tiny, recipe))
    before, after = report.profiles
    assert (before.subject, after.subject) == ("source", "pressed")
    assert by_kind(after)["feed-forward"].flops == pytest.approx(by_kind(before)["feed-forward"].flops / 2, rel=0.01)
    assert [shape.length for shape in after.shapes] == [16, 64]
    assert before.device is not None
    assert "H100" in before.device.name


@pytest.mark.slow
def test_the_command_prints_it_for_people_and_for_machines(bert_tiny: Path):
    runner = CliRunner()
    shown = runner.invoke(app, ["profile", str(bert_tiny), "--device", "none", "--length", "32"])
    assert shown.exit_code == 0, shown.output
    assert "feed-forward" in shown.output
    machine = runner.invoke(app, ["profile", str(bert_tiny), "--device", "h100", "--length", "32", "--json"])
    assert json.loads(machine.stdout)["shapes"][0]["length"] == 32


def test_a_family_whose_parts_are_unknown_is_refused(tmp_path: Path):
    header = inspect_model(FolderFiles(_model("LlamaForCausalLM", tmp_path / "m")))
    other = header.model_copy(update={"model_type": "falcon"})
    with pytest.raises(NightpressError, match="where its heads and channels lie"):
        make_plan(parse_recipe({"name": "r", "passes": [{"pass": "profile"}], "exports": ["safetensors"]}), other)
