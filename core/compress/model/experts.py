"""Mixtures of experts with linear layers of their own.

transformers holds the experts of a mixture as one tensor; their files hold a matrix each. Here the experts are taken apart as in the files, so that
each expert's layers are calibrated like any others, with the tokens that the router gave it.
"""

from typing import Any

import torch
from torch import Tensor, nn

#: What the files call an expert's gate, up and down projection, where it is not as below; by config.json's `model_type`.
_PARTS = {"mixtral": ("w1", "w3", "w2")}
_USUAL_PARTS = ("gate_proj", "up_proj", "down_proj")


class Experts(nn.ModuleList):
    """Takes the place of the fused experts of a mixture."""

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
        self.act_fn: Any = fused.act_fn
        self.real: Tensor | None = None  #: bool [tokens]: padding is shown to no expert
        self.shown_all: frozenset[int] = frozenset()  #: experts that are run on every token, whoever it is routed to

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width], top_k_index and top_k_weights [tokens, chosen] → [tokens, width]"""
        out = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            chosen = top_k_index == number
            if self.real is not None:
                chosen &= self.real[:, None]
            tokens, place = torch.where(chosen)
            if number in self.shown_all:
                made = self._run_on_all(expert, hidden_states)[tokens]
            elif len(tokens):
                made = self._run(expert, hidden_states[tokens])
            else:
                continue
            out.index_add_(0, tokens, (made * top_k_weights[tokens, place, None]).to(out.dtype))
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
    """Put `Experts` in the place of every fused mixture whose experts are gated and without biases; others stay as they are."""
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            parameters = {key for key, _ in child.named_parameters(recurse=False)}
            if parameters == {"gate_up_proj", "down_proj"}:
                setattr(holder, name, Experts(child, _PARTS.get(model_type, _USUAL_PARTS)))
