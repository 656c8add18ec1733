"""Longformer's attention over windows, for texts of any length.

The class pads the text to a multiple of the window and cuts it into blocks by strides in memory, and it finds the tokens that see the whole
text by their number. Here each block of half a window reads itself and its two neighbours. Only the class with a classifier lets a token see
the whole text, and that is the first token.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def restate_longformer(model: nn.Module) -> None:
    from transformers.models.longformer.modeling_longformer import (
        LongformerForSequenceClassification,
        LongformerModel,
        LongformerSelfAttention,
    )

    attend = _attend_with_first if isinstance(model, LongformerForSequenceClassification) else _attend
    for module in model.modules():
        if isinstance(module, LongformerSelfAttention):
            module.forward = MethodType(attend, module)
        elif isinstance(module, LongformerModel):
            module._pad_to_window_size = _unpadded


def _unpadded(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    inputs_embeds: Tensor,
    **_: Any,
) -> tuple[Any, ...]:
    return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds


def _attend(self: Any, hidden_states: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor]:
    """hidden_states [B, S, H]; attention_mask [B, S]: 0 for a token that sees its window, negative for padding → [B, S, H]"""
    return (_in_windows(self, hidden_states, attention_mask, first=False),)


def _attend_with_first(self: Any, hidden_states: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor]:
    """As `_attend`; the first token's mask is positive if it sees the whole text and is seen by all."""
    windows = _in_windows(self, hidden_states, attention_mask, first=True)
    query = self.query_global(hidden_states[:, :1])
    key, value = self.key_global(hidden_states), self.value_global(hidden_states)
    query, key, value = (_heads(self, states) for states in (query, key, value))
    scores = query @ key.transpose(2, 3) / self.head_dim**0.5  # [B, heads, 1, S]
    whole = _chances(scores, (attention_mask >= 0)[:, None, None]) @ value
    first = torch.where(attention_mask[:, :1, None] > 0, whole.transpose(1, 2).flatten(2), windows[:, :1])
    return (torch.cat([first, windows[:, 1:]], dim=1),)


def _in_windows(self: Any, hidden_states: Tensor, attention_mask: Tensor, *, first: bool) -> Tensor:
    reach = self.one_sided_attn_window_size
    length = hidden_states.shape[1]
    missing = (reach - length % reach) % reach
    heads = partial(_heads, self)

    def blocks(states: Tensor) -> Tensor:  # [B, S, width] → [B, blocks, reach, width]
        return pad(states, (0, 0, 0, missing)).reshape(len(states), -1, reach, states.shape[-1])

    query, key, value = (layer(hidden_states) for layer in (self.query, self.key, self.value))
    allowed = _neighbourhood(blocks((attention_mask == 0)[..., None].to(query.dtype)))[..., 0] > 0
    allowed = allowed[:, :, None, None] & _band(reach)  # [B, blocks, 1, reach, 3 · reach]
    own = heads(blocks(query)) / self.head_dim**0.5
    scores = own @ heads(_neighbourhood(blocks(key))).transpose(3, 4)
    values = heads(_neighbourhood(blocks(value)))
    if first:  # its key is one more column
        scores = torch.cat([own @ heads(key[:, None, :1]).transpose(3, 4), scores], dim=-1)
        seen = (attention_mask[:, :1] > 0)[:, None, None, None].expand(*allowed.shape[:-1], 1)
        allowed = torch.cat([seen, allowed], dim=-1)
        values = torch.cat([heads(value[:, None, :1]).expand(-1, values.shape[1], -1, -1, -1), values], dim=3)
    answer = (_chances(scores, allowed) @ values).transpose(2, 3).flatten(3).flatten(1, 2)[:, :length]
    return answer.masked_fill((attention_mask < 0)[..., None], 0.0)


def _heads(self: Any, states: Tensor) -> Tensor:
    """[…, T, H] → […, heads, T, width]"""
    return states.reshape(*states.shape[:-1], self.num_heads, self.head_dim).transpose(-3, -2)


def _chances(scores: Tensor, allowed: Tensor) -> Tensor:
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)


def _neighbourhood(blocks: Tensor) -> Tensor:
    """Each block between its neighbours: [B, blocks, reach, width] → [B, blocks, 3 · reach, width]. Beyond the text are zeros."""
    wider = pad(blocks, (0, 0, 0, 0, 1, 1))
    return torch.cat([wider[:, :-2], blocks, wider[:, 2:]], dim=2)


def _band(reach: int) -> Tensor:
    """Which keys of a neighbourhood a block's queries reach: bool [reach, 3 · reach]."""
    distance = torch.arange(3 * reach) - reach - torch.arange(reach)[:, None]
    return distance.abs() <= reach
