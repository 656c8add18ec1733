"""Mixtures of experts in which each expert has linear layers of its own.

transformers fuses all experts of a mixture into one tensor. The files hold separate matrices for each expert. Here the experts are separate
as in the files. So each expert's layers are calibrated like any others, with the tokens that the router sends to that expert.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Names of an expert's gate, up and down projection in the files, by config.json's `model_type`. Other types have the usual names.
_PARTS = {"mixtral": ("w1", "w3", "w2")}
_USUAL_PARTS = ("gate_proj", "up_proj", "down_proj")


class Experts(nn.ModuleList):
    """Replaces the fused experts of a mixture."""

    act_fn: Any

    def __init__(self, fused: Any, parts: tuple[str, str, str]) -> None:
        self._parts = parts
        _, twice_inner, width = fused.gate_up_proj.shape
        shapes = ((width, twice_inner // 2), (width, twice_inner // 2), (twice_inner // 2, width))
        super().__init__(
            nn.ModuleDict(
                {
                    name: nn.Linear(*shape, bias=False, device="meta", dtype=fused.gate_up_proj.dtype)
                    for name, shape in zip(parts, shapes, strict=True)
                }
            )
            for _ in range(len(fused.gate_up_proj))
        )
        self.__dict__["act_fn"] = fused.act_fn  # no submodule: these are the experts alone
        self.real: Tensor | None = None  #: bool [tokens]: False for padding, which no expert gets; None: no padding
        #: Indices of experts that run on every token, not only on those that the router sends to them.
        self.shown_all: frozenset[int] = frozenset()
        #: Called with an expert's index and its outputs [tokens, width], multiplied by the router's weights.
        self.watch: Callable[[int, Tensor], None] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width], top_k_index and top_k_weights [tokens, chosen] → [tokens, width]"""
        out = torch.zeros_like(hidden_states)
        chosen = top_k_index.flatten()
        if self.real is not None:
            chosen = chosen.masked_fill(~self.real.repeat_interleave(top_k_index.shape[1]), len(self))
        # All experts' tokens are found by one sort: to ask for the tokens of each expert would wait for the device each time.
        by_expert = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self) + 1).tolist()
        all_tokens = torch.split(by_expert // top_k_index.shape[1], counts)
        all_weights = torch.split(top_k_weights.flatten()[by_expert, None], counts)
        for number, (expert, tokens, weights) in enumerate(zip(self, all_tokens, all_weights, strict=False)):
            if number in self.shown_all:
                made = self._run_on_all(expert, hidden_states)[tokens]
            elif len(tokens):
                made = self._run(expert, hidden_states[tokens])
            else:
                continue
            weighted = made * weights
            if self.watch is not None:
                self.watch(number, weighted)
            out.index_add_(0, tokens, weighted.to(out.dtype))
        return out

    def _run_on_all(self, expert: Any, hidden_states: Tensor) -> Tensor:
        if self.real is None:
            return self._run(expert, hidden_states)
        made = torch.zeros_like(hidden_states)
        made[self.real] = self._run(expert, hidden_states[self.real])
        return made

    def _run(self, expert: Any, inputs: Tensor) -> Tensor:
        gate, up, down = (expert[name] for name in self._parts)
        result: Tensor = down(self.act_fn(gate(inputs)) * up(inputs))
        return result


def take_apart(model: nn.Module, model_type: str) -> None:
    """Replace every fused mixture by `Experts` if its experts are gated and have no biases. Other mixtures are not changed."""
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            parameters = {key for key, _ in child.named_parameters(recurse=False)}
            if parameters == {"gate_up_proj", "down_proj"}:
                setattr(holder, name, Experts(child, _PARTS.get(model_type, _USUAL_PARTS)))
