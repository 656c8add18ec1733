"""Several processes share out a block's solving: rows of every weight, and factors of Gram matrices."""

from pathlib import Path

import pytest
import torch

from nightpress.core.compress.executors.blocks import press_blocks
from nightpress.core.compress.passes.sensitivity import Sensitivity
from nightpress.core.compress.ranks.launch import Ranks
from tests.block_models import context_of, linears_of, save_model, token_ids
from tests.rank_presses import DENSE, load
from tests.rank_rows import errors_of, factors_together, hands_factors_out, joins_rows, lingers
from tests.service import eventually

# Slow: its processes import the libraries.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("tests_can_be_imported", "one_thread")]


def test_rows_are_joined_in_their_order_whether_or_not_they_divide(three: Ranks):
    found = three.run(joins_rows, [0, 1, 2, 3, 7], told=lambda *_: None)
    assert found == [
        [],
        [[0, 2]],
        [[0, 1], [1, 2]],
        [[0, 0], [1, 1], [2, 2]],
        [[0, 0], [1, 0], [2, 1], [3, 1], [4, 2], [5, 2], [6, 2]],
    ]


def test_a_factor_that_processes_compute_together_is_that_of_one(three: Ranks):
    """Panels that divide the matrix, panels that don't, fewer rows than processes in the last ones, and a single panel."""
    found = three.run(factors_together, [1, 16, 48, 65, 70], 16, told=lambda *_: None)
    assert [same for _, same, _ in found] == [True] * 5
    assert [faulty for *_, faulty in found] == [True] * 5
    assert max(distance for distance, *_ in found) < 1e-12


def test_all_processes_get_the_factor_of_each_stack(three: Ranks):
    """Some factors are computed together, the others in rounds, and one is left over."""
    sizes = [20, 40, 16, 24, 40, 12]
    found = three.run(hands_factors_out, sizes, 32, told=lambda *_: None)
    assert [[columns for columns, _ in process] for process in found] == [[20, 40, 40, 16, 24, 12]] * 3
    assert max(distance for process in found for _, distance in process) < 1e-5


def test_processes_measure_the_sensitivity_of_some_weights_each(three: Ranks, tmp_path: Path):
    source = tmp_path / "model"
    save_model(DENSE, source)
    found = {}
    for name, ranks in (("alone", None), ("three", three)):
        work = tmp_path / name
        method, samples = Sensitivity(errors_of, source), {"input_ids": token_ids(samples=9)}
        context = context_of(source, work, ranks=ranks)
        press_blocks(source, work / "out", method, samples, context, chosen=linears_of(source), recipe="errors")
        found[name] = {key: tensor for key, tensor in load(work / "out").items() if key.endswith("_errors")}
    assert found["alone"].keys() == found["three"].keys() != set()
    for name, errors in found["alone"].items():
        torch.testing.assert_close(found["three"][name], errors, rtol=1e-4, atol=1e-4)


def test_a_process_says_where_it_is(tmp_path: Path):
    """As a benchmark asks before it ends a run that hangs. The process goes on."""
    until, errors = tmp_path / "until", tmp_path / "errors"
    with Ranks(1, tmp_path) as ranks:

        def told(*_: object) -> None:
            ranks.show_stacks()
            eventually(lambda: "in lingers" in errors.read_text())
            until.touch()

        ranks.run(lingers, until, errors, told=told)
