"""A classifier with heads behind its blocks: as a module that trains, and as the folder that keeps it."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nightpress.core.compress.model.checkpoint import disk_errors, write_file
from nightpress.core.compress.model.networks import load_model
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes.adapt import Policy

EXITS_FILE = "exits.json"
_WEIGHTS_FILE = "exits/heads.safetensors"  #: beside the model's own files it would be taken for one of their shards


class ExitPlan(BaseModel):
    """Where a model's heads stand, and when an input leaves."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    blocks: tuple[int, ...]  #: those with a head behind them, counted from 0
    total: int  #: blocks of the model
    policy: Policy
    threshold: float

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks run up to each head and up to the model's own."""
        return (*(block + 1 for block in self.blocks), self.total)


class HeadOutputs(NamedTuple):
    """What all heads say of a batch, the model's own last."""

    logits: list[Tensor]  #: [B, C] each
    scores: list[Tensor]  #: [B] each, of all but the last


class ExitModel(nn.Module):
    """A classifier and a head (dense, tanh, linear, on the mean over tokens) behind each of some blocks.

    The first token, on which the model's own head may stand, has taken in little of the others after a block or two.
    """

    def __init__(self, model: Any, blocks: Sequence[int], policy: Policy) -> None:
        super().__init__()
        self.model, self.blocks, self.policy = model, tuple(blocks), policy
        width, classes = model.config.hidden_size, model.config.num_labels
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, classes))
            for _ in self.blocks
        )

    def forward(self, ids: Tensor, mask: Tensor, types: Tensor | None = None) -> HeadOutputs:
        extra = {} if types is None else {"token_type_ids": types}
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, return_dict=True, **extra)
        real = mask.to(out.logits.dtype)[..., None]
        count = real.sum(1).clamp(min=1)
        means = [(out.hidden_states[block + 1] * real).sum(1) / count for block in self.blocks]
        said = [head(mean) for head, mean in zip(self.heads, means, strict=True)]
        return HeadOutputs([*said, out.logits], exit_scores(said, mask, self.policy))

    def answer(self, ids: Tensor, mask: Tensor, plan: ExitPlan) -> tuple[Tensor, Tensor]:
        """(logits [B, C], blocks run [B]): each input's at the first head that is sure enough."""
        heads = self(ids, mask)
        sure = [score >= plan.threshold for score in heads.scores]
        left = torch.stack([*sure, torch.ones_like(sure[0])]).int().argmax(0)  # the first head that is sure
        depths = torch.tensor(plan.depths, device=left.device)
        return torch.stack(heads.logits)[left, torch.arange(len(left))], depths[left]


def exit_scores(logits: Sequence[Tensor], mask: Tensor, policy: Policy) -> list[Tensor]:
    """How sure each head is: logits [B, C] of each and mask [B, S] → [B] of each, none of which depends on a later head. An input leaves at the first head whose score reaches the threshold.

    Confidence and entropy lie in 0…1; patience counts the heads before that chosen the same without a break; length is heads passed per token.
    """
    if policy == "length":
        return [(at + 1) / mask.sum(1).float() for at in range(len(logits))]
    if policy == "patience":
        chosen = [head.argmax(-1) for head in logits]
        runs = [torch.zeros_like(chosen[0], dtype=torch.float32)]
        for before, now in itertools.pairwise(chosen):
            runs.append((runs[-1] + 1) * (now == before))
        return runs
    return [_certainty(head, policy) for head in logits]


def _certainty(logits: Tensor, policy: Policy) -> Tensor:
    logp = torch.log_softmax(logits.float(), dim=-1)
    if policy == "confidence":
        return logp.amax(-1).exp()
    entropy = -(logp.exp() * logp).sum(-1)
    return 1 - entropy / math.log(logits.shape[-1])


def save_heads(folder: Path, model: ExitModel, plan: ExitPlan) -> None:
    """Put the heads and the plan beside the model's files."""
    with disk_errors():
        (folder / _WEIGHTS_FILE).parent.mkdir(exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.heads.state_dict().items()}
        save_file(weights, folder / _WEIGHTS_FILE)
    write_file(folder / EXITS_FILE, plan.model_dump_json(indent=1).encode() + b"\n")


def load_exits(folder: Path, header: ModelHeader, *, attention: str | None = None) -> tuple[ExitModel, ExitPlan]:
    """The model with its heads, in evaluation mode."""
    plan = ExitPlan.model_validate(json.loads((folder / EXITS_FILE).read_bytes()))
    model = ExitModel(load_model(folder, header, attention=attention), plan.blocks, plan.policy)
    model.heads.load_state_dict(load_file(folder / _WEIGHTS_FILE))
    return model.eval(), plan
