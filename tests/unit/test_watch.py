"""Which layers of a block share an input, and which inputs a waiting batch need not keep."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from nightpress.core.compress.executors.blocks.groups import ENTERED, Groups, find_groups
from nightpress.core.compress.executors.blocks.in_turn import InTurn


class _Block(nn.Module):
    """Attention with a residual connection, then up and down. `parallel`: up reads the input of q again, as in GPT-NeoX."""

    def __init__(self, *, parallel: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.parallel = parallel

    def forward(self, hidden: Tensor, beside: Tensor) -> Tensor:
        normed = hidden * 2
        attended = hidden + self.o((self.q(normed) * self.k(normed)).tanh()) + beside
        inner = self.up(attended * (normed if self.parallel else 3))
        return attended + self.down(inner.tanh())


def _learn(block: _Block) -> Groups | None:
    batch, beside = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    return find_groups(block, dict(block.named_children()), lambda: block(batch.clone(), beside))


@torch.no_grad()
def test_inputs_are_spent_once_nothing_reads_them_again():
    assert _learn(_Block()) == Groups(
        layers=(("q", "k"), ("o",), ("up",), ("down",)), spent=((), (0,), (ENTERED, 1), (2,))
    )


@torch.no_grad()
def test_inputs_that_a_later_layer_reads_again_are_kept():
    found = _learn(_Block(parallel=True))
    assert found is not None
    assert found.spent == ((), (), (ENTERED, 0, 1), (2,)) or found.spent == ((), (), (ENTERED, 1), (0, 2))


@torch.no_grad()
def test_what_a_block_is_lent_is_never_spent():
    """An example is an encoder's states in a decoder's attention: the next block reads them too."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: Tensor, states: Tensor) -> Tensor:
            return hidden + self.o(self.k(states).tanh())

    block, states = Cross(), torch.randn(2, 3, 8)
    before = states.clone()
    found = find_groups(block, dict(block.named_children()), lambda: block(torch.randn(2, 3, 8), states))
    assert found is not None
    assert 0 not in found.spent[1]
    assert torch.equal(states, before)


@torch.no_grad()
def test_texts_that_wait_end_as_if_they_had_not_and_hold_no_spent_inputs():
    block, beside = _Block(), torch.randn(2, 3, 8)
    batches = [torch.randn(2, 3, 8) for _ in range(3)]
    expected = [block(batch, beside) for batch in batches]
    groups = _learn(block)
    assert groups is not None
    came_out: dict[int, Tensor] = {}
    held: list[list[int]] = []

    def through(number: int) -> None:
        came_out[number] = block(batches[number], beside)

    def settle(_layers: Sequence[str]) -> None:
        held.append([batch.numel() for batch in batches])

    runs = [partial(through, number) for number in range(3)]
    shown: list[int] = []
    turns = InTurn(groups, block, dict(block.named_children()))
    turns.run(runs, lambda _inputs, number: shown.append(number), settle, to_the_end=True)
    assert shown == [0, 1, 2] * 4
    assert all(torch.equal(came_out[number], tensor) for number, tensor in enumerate(expected))
    assert held == [[48] * 3, [48] * 3, [0] * 3, [0] * 3]
