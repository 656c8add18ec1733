"""How a model's blocks are found: rows that run one after the other, and models that must be held whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nightpress.core.compress.executors.blocks.groups import ENTERED, find_groups
from nightpress.core.compress.model.rows import Call, NoRows, order_of_calls, possible_rows, with_cache


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor, *, store: Any = None) -> Tensor:
        del store
        return hidden + self.linear(hidden)


class _Model(nn.Module):
    """Two rows of blocks, of which a way of running uses some."""

    def __init__(self, run: "Callable[[_Model, Tensor], object]") -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block() for _ in range(3))
        self.tower = nn.ModuleList(_Block() for _ in range(2))
        self._run = run

    def forward(self, hidden: Tensor) -> object:
        return self._run(self, hidden)


def _chain(model: _Model, hidden: Tensor) -> Tensor:
    for block in model.layers:
        hidden = block(hidden)
    return hidden


def _found(run: Callable[[_Model, Tensor], object]) -> list[tuple[str, tuple[int, ...]]]:
    model = _Model(run)
    rows = order_of_calls(
        possible_rows(model),
        lambda path, blocks: setattr(model, path, blocks),
        lambda: model(torch.zeros(1, 2, 4)),
        lambda path, at: getattr(model, path)[at].__dict__["block"],
    )
    assert isinstance(model.layers[0], _Block)  # the blocks are back in their places
    return [(row.path, row.order) for row in rows]


def test_only_the_rows_that_run_are_found():
    assert _found(_chain) == [("layers", (0, 1, 2))]


def test_a_row_that_runs_twice_in_order_and_rows_behind_each_other_are_found():
    def run(model: _Model, hidden: Tensor) -> Tensor:
        for block in model.tower:
            hidden = block(block(hidden))
        return _chain(model, hidden * 2)

    assert _found(run) == [("tower", (0, 0, 1, 1)), ("layers", (0, 1, 2))]


def _changed_between(model: _Model, hidden: Tensor) -> Tensor:
    for block in model.layers:
        hidden = block(hidden) * 2
    return hidden


def _again(model: _Model, hidden: Tensor) -> Tensor:
    return model.layers[0](_chain(model, hidden))  # type: ignore[no-any-return]


def _in_turns(model: _Model, hidden: Tensor) -> Tensor:
    aside = torch.zeros(1, 2, 4)
    for block, other in zip(model.layers, model.tower, strict=False):
        hidden, aside = block(hidden), other(aside)
    return model.layers[2](hidden)  # type: ignore[no-any-return]


def _some(model: _Model, hidden: Tensor) -> Tensor:
    return model.layers[1](model.layers[0](hidden))  # type: ignore[no-any-return]


def _hands_on(model: _Model, hidden: Tensor) -> Tensor:
    store: dict[str, Tensor] = {}
    for block in model.layers:
        hidden = block(hidden, store=store)
    return hidden


def _fails(model: _Model, hidden: Tensor) -> Tensor:
    raise RuntimeError("no rope")


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (_changed_between, "changes the hidden states between"),
        (_again, "runs again after others"),
        (_in_turns, "take turns"),
        (_some, "leaves out some"),
        (_hands_on, "hand values on"),
        (_fails, "RuntimeError: no rope"),
        (lambda _model, hidden: hidden, "no repeated blocks"),
    ],
)
def test_what_can_not_be_run_block_by_block_is_told_with_its_reason(run: Callable[[_Model, Tensor], object], why: str):
    with pytest.raises(NoRows, match=why):
        _found(run)


class _Chooses(nn.Module):
    """Its second part reads the input again, in a way that changes no output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.first(hidden)
        _batch, length, _width = hidden.shape if isinstance(hidden, Tensor) else (0, 0, 0)
        out: Tensor = self.second(inner)
        return out[:, : hidden.shape[1]] if length else out


def test_an_input_whose_later_read_changes_no_output_is_not_freed():
    block = _Chooses()
    linears = {"first": block.first, "second": block.second}
    groups = find_groups(block, linears, lambda: block(torch.ones(1, 3, 4)))
    assert groups is not None
    assert ENTERED not in groups.spent[1]


class _Caching(nn.Module):
    def forward(self, hidden: Tensor, positions: Tensor, past_key_values: Any = None, **more: Any) -> list[Any]:
        del hidden
        return [positions, past_key_values, *more.values()]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Call((1,), {}), [1, "ours"]),
        (Call((1, None), {}), [1, "ours"]),  # RecurrentGemma hands its cache on by its place
        (Call((), {"positions": 1, "past_key_values": None, "other": 2}), [1, "ours", 2]),
    ],
)
def test_a_cache_takes_the_place_of_the_blocks_own(call: Call, expected: list[Any]) -> None:
    block = _Caching()
    given = with_cache(block, call, "ours")
    assert block(torch.zeros(1), *given.args, **given.kwargs) == expected
