"""What plans refuse by a class's name is what the table of families found, and the table refuses nothing else late."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nightpress.core.errors import NightpressError
from nightpress.core.recipes.checks import check_pass
from nightpress.core.recipes.exceptions import why_not, why_not_by_blocks
from nightpress.core.recipes.exports import Export
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import is_linear_weight
from nightpress.core.recipes.passes import PassOptions, catalog

_TABLE = json.loads((Path(__file__).parents[1] / "zoo" / "expected.json").read_bytes())
#: What a job says of a model as it runs: a plan could have said it.
_LATE = re.compile(
    r"can't be traced|^The files have no|^The model's (cache|blocks)|^A block of|can scale nothing|and the pass chose several"
)
_GRAPHS = ("onnx", "openvino")


def _cells() -> Iterator[tuple[str, str, str, str, str]]:
    """(model type, class, cell, state, reason) of each class that was tried."""
    for rows in _TABLE.values():
        for model_type, row in rows.items():
            for cell, found in row.items():
                if cell not in {"class", "built"}:
                    yield model_type, row["class"], cell, *found


def _header(model_type: str, architecture: str) -> ModelHeader:
    return ModelHeader(model_type=model_type, architecture=architecture, config={}, tensors=(), has_tokenizer=True)


def test_what_the_table_refuses_a_plan_refuses() -> None:
    late = [f"{model_type}: {cell}: {why}" for model_type, _, cell, _, why in _cells() if _LATE.search(why)]
    assert late == []


def test_no_cell_fails() -> None:
    failed = [f"{model_type}: {cell}: {why}" for model_type, _, cell, state, why in _cells() if state == "fails"]
    assert failed == []


def test_a_reason_of_a_plan_is_that_of_the_table() -> None:
    seen = 0
    for model_type, architecture, cell, state, why in _cells():
        header = _header(model_type, architecture)
        expected = why_not(cell, header) or (why_not("graph", header) if cell in _GRAPHS else None)
        if expected is not None:
            assert state == "refused", f"{model_type}: {cell}"
            assert expected in why
            seen += 1
    assert seen > 30


@pytest.mark.parametrize(("model_type", "name"), [("kimi_linear", "wanda"), ("t5gemma2", "gptq"), ("gptj", "kv-cache")])
def test_a_plan_says_why_a_class_can_not_be_pressed(model_type: str, name: str) -> None:
    header = _header(model_type, "")
    (options,) = (made for made in map(_made, catalog.pass_types()) if made is not None and made.name == name)
    with pytest.raises(NightpressError) as error:
        check_pass(options, header)
    assert (why_not(name, header) or why_not_by_blocks(header) or "?") in error.value.message
    assert error.value.hint


def _made(options: type[PassOptions]) -> PassOptions | None:
    try:
        return options.model_validate({})
    except ValueError:  # its user must name something
        return None


def test_an_export_says_why_a_class_can_not_be_traced() -> None:
    with pytest.raises(NightpressError, match="blocks whose number a traced graph would fix"):
        Export(format="onnx").check(_header("pegasus_x", "PegasusXForConditionalGeneration"))
    with pytest.raises(NightpressError, match="Fourier transforms"):
        Export(format="openvino").check(_header("fnet", "FNetForMaskedLM"))
    Export(format="onnx").check(_header("fnet", "FNetForMaskedLM"))


def test_a_table_of_segments_is_no_linear_layer() -> None:
    """Kosmos-2.5 calls it `segment_emb`."""
    table = TensorInfo(name="text_model.model.segment_emb.weight", dtype="F32", shape=(2, 64), size=512)
    assert not is_linear_weight(table, ())
    assert is_linear_weight(replace(table, name="text_model.model.layers.0.fc1.weight"), ())
