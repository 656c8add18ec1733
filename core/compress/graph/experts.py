"""Mixtures of experts in a graph: every expert reads every token, and the router's weights choose among the answers.

Which experts a token goes to is known only as the graph runs. transformers sorts the tokens by expert, which a traced graph can't repeat.
"""

from typing import Any

import torch
from torch import Tensor, nn


class EveryExpert(nn.Module):
    """Replaces the fused experts of a mixture in transformers by linear layers of their own, so that a pass rounds each of them."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.into = "gate_up_proj" if fused.has_gate else "up_proj"  #: name of the layer that reads an expert's input
        self.count = fused.num_experts
        for number in range(self.count):  # their names are numbers, as in files that hold experts one by one
            layers = {name: _layer(fused, name, number) for name in (self.into, "down_proj")}
            self.add_module(str(number), nn.ModuleDict(layers))
        for name in list(fused._parameters):
            del fused._parameters[name]
        self.fused = fused  # what is left of it: its activation and its norm

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, width], top_k_index and top_k_weights [tokens, chosen] → [tokens, width]"""
        numbers = torch.arange(self.count, device=top_k_index.device)
        # [tokens, chosen, experts] → [tokens, experts]: 0 for experts that the router didn't choose
        weights = ((top_k_index[..., None] == numbers) * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)
        out = torch.zeros_like(hidden_states)
        for number in range(self.count):
            out = out + weights[:, number, None] * self._answer(number, hidden_states)
        return out

    def _answer(self, number: int, inputs: Tensor) -> Tensor:
        expert: Any = self.get_submodule(str(number))
        product = expert[self.into](inputs)
        inner = self.fused._apply_gate(product) if self.fused.has_gate else self.fused.act_fn(product)
        answer: Tensor = expert["down_proj"](inner)
        return self.fused.post_expert_norm(answer) if self.fused.has_post_expert_norm else answer


def _layer(fused: Any, name: str, number: int) -> nn.Linear:
    """The linear layer of one expert. Its weight shares the fused tensor's memory."""
    weight = getattr(fused, name)[number]
    weight = weight.T if fused.is_transposed else weight  # [out, in]
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=fused.has_bias, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if fused.has_bias:
        layer.bias = nn.Parameter(getattr(fused, f"{name}_bias")[number], requires_grad=False)
    return layer


def spread_experts(model: nn.Module) -> bool:
    """Replace every mixture whose fused experts transformers computes by one of its kernels. Returns whether there is any."""
    found = False
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if hasattr(child, "has_post_expert_norm"):  # transformers' `use_experts_implementation` sets it
                setattr(holder, name, EveryExpert(child))
                found = True
    return found
