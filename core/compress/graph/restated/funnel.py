"""Funnel's pooling and its positions, for texts of any length.

The class counts positions in Python, and asks whether a text is long enough to be pooled. A trace would fix both. Here a text that is too
short is pooled, too, by pairs of the same token, and positions are counted in tensors. So a graph also answers for the few shortest texts, for which the
class counts too few positions and raises an error.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Relative:
    """Positions of a block's attention with scores by distance. It is made once for all layers of a block."""

    sines: Tensor  #: of each distance for which scores are computed, [distances, H]
    places: Tensor  #: of the score of a query and a key among those of all queries and distances, [S, C]


def restate_funnel(model: nn.Module) -> None:
    from transformers.models.funnel import modeling_funnel

    for module in model.modules():
        if isinstance(module, modeling_funnel.FunnelEncoder):
            module.forward = MethodType(_encode, module)
        elif isinstance(module, modeling_funnel.FunnelDecoder):
            module.forward = MethodType(_decode, module)
        elif isinstance(module, modeling_funnel.FunnelRelMultiheadAttention):
            module.relative_positional_attention = MethodType(_scores, module)


def _encode(self: Any, inputs_embeds: Tensor, attention_mask: Tensor, token_type_ids: Tensor, **_: Any) -> Any:
    """inputs_embeds [B, S, H], attention_mask and token_type_ids [B, S] → the last block's states, and those of all layers."""
    from transformers.modeling_outputs import BaseModelOutput

    config, hidden, states = self.config, inputs_embeds, [inputs_embeds]
    mask = attention_mask.type_as(hidden)
    types = self.attention_structure.token_type_ids_to_mat(token_type_ids)  # [B, S, S]
    angles = _angles(self, hidden)
    for number, (block, repeats) in enumerate(zip(self.blocks, config.block_repeats, strict=True)):
        layers = [layer for layer in block for _ in range(repeats)]
        unpooled = hidden
        if number > 0:
            left, right = _pairs(hidden, config)
            hidden = _pooled(hidden, left, right, config.pooling_type)
            mask_before, types, mask = mask, types[:, left], _pooled(mask, left, right, "min")
            angles = angles and [*(part[left] for part in angles[:2]), *angles[2:]]
            if config.pool_q_only:
                where = angles or _relative(config, number, hidden, unpooled, pooled=True)
                inputs = (where, types, mask_before, _apart(config, hidden, unpooled))
                hidden = layers.pop(0)(hidden, unpooled, unpooled, inputs)[0]
                states.append(hidden)
            types = types[:, :, left]
            angles = angles and [*angles[:2], *(part[left] for part in angles[2:])]
        where = angles or _relative(config, number, hidden, hidden, pooled=False)
        inputs = (where, types, mask, _apart(config, hidden, hidden))
        for layer in layers:
            hidden = layer(hidden, hidden, hidden, inputs)[0]
            states.append(hidden)
    return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(states))


def _decode(
    self: Any,
    final_hidden: Tensor,
    first_block_hidden: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    **_: Any,
) -> Any:
    """final_hidden [B, T, H], first_block_hidden [B, S, H] → [B, S, H]"""
    from transformers.modeling_outputs import BaseModelOutput

    config, stride = self.config, 2 ** (len(self.config.block_sizes) - 1)
    at = torch.arange(first_block_hidden.shape[1])
    source = (at - 1 + stride) // stride if config.separate_cls else at // stride
    last = _length(final_hidden) - 1
    spread = final_hidden[:, torch.minimum(source, last)]
    hidden = spread * (source <= last)[:, None].to(spread.dtype) + first_block_hidden
    types = self.attention_structure.token_type_ids_to_mat(token_type_ids)
    where = _angles(self, hidden) or _relative(config, 0, hidden, hidden, pooled=False)
    inputs = (where, types, attention_mask, _apart(config, hidden, hidden))
    for layer in self.layers:
        hidden = layer(hidden, hidden, hidden, inputs)[0]
    return BaseModelOutput(last_hidden_state=hidden)


def _length(states: Tensor) -> Tensor:
    return torch.arange(states.shape[1])[-1] + 1


def _pairs(states: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """The two tokens that each pooled token is made of; the same token twice where there is no second, or none is pooled."""
    length = states.shape[1]
    if not config.separate_cls:
        at = 2 * torch.arange((length + 1) // 2)
        return at, torch.minimum(at + 1, _length(states) - 1)
    if config.truncate_seq:  # two tokens stay two
        two = torch.sym_max(0, torch.sym_min(length - 1, 3 - length))  # type: ignore[no-untyped-call]
        at = torch.arange((length + 1) // 2 + two)
    else:
        at = torch.arange(length // 2 + 1)
    left = (2 * at - 1).clamp(min=0)
    last = _length(states) - (2 if config.truncate_seq else 1)
    return left, torch.maximum(torch.minimum(2 * at, last), left)


def _pooled(states: Tensor, left: Tensor, right: Tensor, how: str) -> Tensor:
    first, second = states[:, left], states[:, right]
    if how == "mean":
        return (first + second) / 2
    return torch.maximum(first, second) if how == "max" else torch.minimum(first, second)


def _apart(config: Any, queries: Tensor, keys: Tensor) -> Tensor | None:
    """Zeros for the first token's scores by position and type, if the class keeps it apart: [S, C]."""
    if not config.separate_cls:
        return None
    rows, columns = (torch.arange(states.shape[1]) > 0 for states in (queries, keys))
    return (rows[:, None] & columns).to(queries.dtype)


def _angles(self: Any, states: Tensor) -> list[Tensor] | None:
    """For attention of kind `factorized`, sines and cosines of each position: two for queries, two for keys; else None."""
    if self.config.attention_type != "factorized":
        return None
    return list(self.attention_structure.get_position_embeds(states.shape[1], states.dtype, states.device))


def _relative(config: Any, number: int, queries: Tensor, keys: Tensor, *, pooled: bool) -> _Relative:
    """What block `number` needs of distances. pooled: the queries are, and the keys aren't.

    Funnel-Transformer (arXiv 2006.03236), appendix A.2.1: the score of query i and key j is that of the distance i − j, and with pooled
    queries of 2i − j. The first token, if it's kept apart, is at the place of the one before the first pair.
    """
    rows, columns = (torch.arange(states.shape[1]) for states in (queries, keys))
    stride = 2 if pooled else 1
    apart = 1 if pooled and config.separate_cls else 0
    most = 2 * queries.shape[1] + (keys.shape[1] if pooled else 0)
    start = stride * _length(queries)
    half, unit = config.d_model // 2, 2**number // stride
    frequencies = 1 / 10000 ** (torch.arange(half, dtype=queries.dtype) / half)
    angles = ((start - apart - torch.arange(most)) * unit).to(queries.dtype)[:, None] * frequencies
    places = rows[:, None] * most + start - stride * rows[:, None] + columns
    return _Relative(torch.cat([angles.sin(), angles.cos()], dim=-1), places)


def _scores(self: Any, where: Any, q_head: Tensor, context_len: int, cls_mask: Tensor | None = None) -> Tensor:
    """Scores by position. q_head [B, S, heads, width] → [B, heads, S, C]"""
    scores: Tensor
    if isinstance(where, _Relative):
        r_head = torch.einsum("td,dnh->tnh", where.sines, self.r_kernel)
        scores = torch.einsum("binh,tnh->bnit", q_head + self.r_r_bias * self.scale, r_head)  # [B, heads, S, distances]
        scores = scores.flatten(2)[:, :, where.places]
        return scores if cls_mask is None else scores * cls_mask
    scores = type(self).relative_positional_attention(self, where, q_head, context_len, cls_mask)
    return scores
