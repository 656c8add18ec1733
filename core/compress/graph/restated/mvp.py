"""MVP's attention without its checks of sizes.

The class compares the size of a mask with the number of queries and keys. In a decoder's graph with a cache, these are sums of dimensions
that vary, and the mask of the encoder's answer is the same for all queries.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def restate_mvp(model: nn.Module) -> None:
    from transformers.models.mvp.modeling_mvp import MvpAttention

    for module in model.modules():
        if isinstance(module, MvpAttention):
            module.forward = MethodType(_attend, module)


def _attend(
    self: Any,
    hidden_states: Tensor,
    key_value_states: Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    attn_prompt: Tensor | None = None,
    **_more: Any,
) -> tuple[Tensor, None]:
    """hidden_states [B, T, H]; attention_mask [B, 1, 1 or T, S], added to the scores; attn_prompt [2, heads, P, width] → [B, T, H]"""
    heard = hidden_states if key_value_states is None else key_value_states
    query, key, value = (
        layer(states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        for layer, states in ((self.q_proj, hidden_states), (self.k_proj, heard), (self.v_proj, heard))
    )
    if past_key_values is not None:
        cache = past_key_values
        if hasattr(cache, "cross_attention_cache"):
            cache = cache.self_attention_cache if key_value_states is None else cache.cross_attention_cache
        key, value = cache.update(key, value, self.layer_idx)
    if attn_prompt is not None:
        key, value = (
            torch.cat([prompt.expand(len(states), -1, -1, -1), states], dim=2)
            for prompt, states in zip(attn_prompt, (key, value), strict=True)
        )
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (attn_prompt[0].shape[1], 0))
    scores = query @ key.transpose(2, 3) * self.scaling  # [B, heads, T, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    answer = scores.softmax(-1) @ value
    return self.out_proj(answer.transpose(1, 2).flatten(2)), None
