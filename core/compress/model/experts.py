"""Mixtures of experts in which each expert has linear layers of its own.

transformers fuses all experts of a mixture into one tensor. The files hold separate matrices for each expert. Here the experts are separate
as in the files. So each expert's layers are calibrated like any others, with the tokens that the router sends to that expert.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nightpress.core.compress.model.expert_exchange import ExpertExchange

#: Names of an expert's gate, up and down projection in the files.
_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PLAIN = ("up_proj", "down_proj")  #: of an expert without a gate
_NUMBERED = re.compile(r"\.experts\.0\.([A-Za-z0-9_]+)\.weight$")


class Experts(nn.ModuleList):
    """Replaces the fused experts of a mixture."""

    def __init__(self, fused: Any, parts: tuple[str, ...]) -> None:
        *self.into, self.down = (
            parts  #: names of an expert's layers that read its input, and of the layer that makes its output
        )
        count, width, inner = fused.down_proj.shape
        shapes = (*[(width, inner)] * (len(parts) - 1), (inner, width))
        super().__init__(
            nn.ModuleDict(
                {
                    name: nn.Linear(*shape, bias=False, device="meta", dtype=fused.down_proj.dtype)
                    for name, shape in zip(parts, shapes, strict=True)
                }
            )
            for _ in range(count)
        )
        for name in list(fused._parameters):
            del fused._parameters[name]
        self.__dict__["fused"] = fused  # hidden from nn.Module: it is asked only how a gate is applied
        self.real: Tensor | None = None  #: bool [tokens]: False for padding, which no expert gets; None: no padding
        #: Indices of experts that run on every token, not only on those that the router sends to them.
        self.shown_all: frozenset[int] = frozenset()
        #: Called with an expert's index and its outputs [tokens, width], multiplied by the router's weights.
        self.watch: Callable[[int, Tensor], None] | None = None
        #: Where the experts live; None: all of them in this process. The weights of the others' experts are never loaded.
        self.exchange: ExpertExchange | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width], top_k_index and top_k_weights [tokens, chosen] → [tokens, width]

        While experts of several processes are shown all tokens, the result is zero: the run only serves to watch them.
        """
        out = torch.zeros_like(hidden_states)
        if self.exchange is not None and self.shown_all:
            self._show_all(self.exchange, hidden_states)
            return out
        chosen = top_k_index.flatten()
        if self.real is not None:
            chosen = chosen.masked_fill(~self.real.repeat_interleave(top_k_index.shape[1]), len(self))
        # All experts' tokens are found by one sort: to ask for the tokens of each expert would wait for the device each time.
        by_expert = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self) + 1).tolist()
        tokens = torch.split(by_expert // top_k_index.shape[1], counts)[:-1]
        weights = torch.split(top_k_weights.flatten()[by_expert, None], counts)[:-1]
        if self.exchange is None:
            answers = self._answers(hidden_states, tokens)
        else:
            answers = self.exchange.answers(hidden_states, tokens, self._run)
        for number, made in answers:
            weighted = made * weights[number]
            if self.watch is not None:
                self.watch(number, weighted)
            out.index_add_(0, tokens[number], weighted.to(out.dtype))
        return out

    def take_part(self) -> None:
        """Run this process's experts on the tokens of the other processes alone."""
        assert self.exchange is not None
        weight = self[self.exchange.own[0]][self.into[0]].weight  # type: ignore[index]
        nothing = weight.new_empty(0, weight.shape[1])
        self.real = None
        self(nothing, torch.empty(0, 1, dtype=torch.long, device=weight.device), nothing[:, :1])

    def _answers(self, hidden_states: Tensor, tokens: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Each expert's answers to its tokens."""
        for number, own in enumerate(tokens):
            if number in self.shown_all:
                yield number, self._run_on_all(number, hidden_states)[own]
            elif len(own):
                yield number, self._run(number, hidden_states[own])

    def _show_all(self, exchange: ExpertExchange, hidden_states: Tensor) -> None:
        shown = [number for number in exchange.own if number in self.shown_all]
        exchange.show_all(hidden_states if self.real is None else hidden_states[self.real], shown, self._run)

    def _run_on_all(self, expert: int, hidden_states: Tensor) -> Tensor:
        if self.real is None:
            return self._run(expert, hidden_states)
        made = torch.zeros_like(hidden_states)
        made[self.real] = self._run(expert, hidden_states[self.real])
        return made

    def _run(self, number: int, inputs: Tensor) -> Tensor:
        expert: Any = self[number]
        *into, down = (expert[name] for name in (*self.into, self.down))
        fused = self.__dict__["fused"]
        products = [layer(inputs) for layer in into]
        if len(products) == 1:
            inner = fused.act_fn(products[0])
        elif hasattr(fused, "_apply_gate"):
            inner = fused._apply_gate(torch.cat(products, dim=-1))
        else:
            inner = fused.act_fn(products[0]) * products[1]
        result: Tensor = down(inner)
        return result


def take_apart(model: nn.Module, names: Iterable[str]) -> None:
    """Replace every fused mixture by `Experts` if the files hold its experts apart, and they have no biases. names: of the files' tensors."""
    found = {match[1] for name in names if (match := _NUMBERED.search(name)) is not None}
    gated = next((parts for parts in _GATED if set(parts) == found), None)
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            fused = {key for key, _ in child.named_parameters(recurse=False)}
            if gated is not None and fused == {"gate_up_proj", "down_proj"}:
                setattr(holder, name, Experts(child, gated))
            elif set(_PLAIN) == found and fused == set(_PLAIN) and child.down_proj.dim() == 3:  # type: ignore[operator]
                setattr(holder, name, Experts(child, _PLAIN))
