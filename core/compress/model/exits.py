"""A classifier with early exits (heads after some blocks): the module, and how it is saved in a folder."""

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
#: In a folder of its own: beside the model's files it would count as one of their shards.
_WEIGHTS_FILE = "exits/heads.safetensors"


class ExitPlan(BaseModel):
    """The blocks that have a head, and the rule by which an input exits."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    blocks: tuple[int, ...]  #: indices of the blocks with a head after them, from 0
    total: int  #: number of the model's blocks
    policy: Policy
    threshold: float

    @property
    def depths(self) -> tuple[int, ...]:
        """The number of blocks that run before each head; the model's own head is the last."""
        return (*(block + 1 for block in self.blocks), self.total)


class HeadOutputs(NamedTuple):
    """The outputs of all heads for a batch, the model's own head last."""

    logits: list[Tensor]  #: [B, C] each
    scores: list[Tensor]  #: [B] each, for all heads but the last


class ExitModel(nn.Module):
    """A classifier with a head after each of some blocks. A head is dense, tanh, linear, on the mean over tokens.

    The model's own head may read the first token. After a block or two, that token contains little of the other tokens, so the heads read
    the mean.
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
        """For each input, the logits of the first head whose score reaches the threshold: (logits [B, C], number of blocks run [B])."""
        heads = self(ids, mask)
        sure = [score >= plan.threshold for score in heads.scores]
        left = torch.stack([*sure, torch.ones_like(sure[0])]).int().argmax(0)  # the first head that is sure
        depths = torch.tensor(plan.depths, device=left.device)
        return torch.stack(heads.logits)[left, torch.arange(len(left))], depths[left]


def exit_scores(logits: Sequence[Tensor], mask: Tensor, policy: Policy) -> list[Tensor]:
    """The certainty of each head: logits [B, C] of each head and mask [B, S] → [B] for each head. No score depends on a later head.

    An input exits at the first head whose score reaches the threshold. Policies `confidence` and `entropy` give scores in 0…1. `patience`
    counts the heads directly before this one that chose the same class. `length` is the number of heads so far per token.
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
    """Save the heads and the plan in the model's folder. Raises NightpressError(disk_full)."""
    with disk_errors():
        (folder / _WEIGHTS_FILE).parent.mkdir(exist_ok=True)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.heads.state_dict().items()}
        save_file(weights, folder / _WEIGHTS_FILE)
    write_file(folder / EXITS_FILE, plan.model_dump_json(indent=1).encode() + b"\n")


def load_exits(folder: Path, header: ModelHeader, *, attention: str | None = None) -> tuple[ExitModel, ExitPlan]:
    """Load the model with its heads, in evaluation mode, and its plan."""
    plan = ExitPlan.model_validate(json.loads((folder / EXITS_FILE).read_bytes()))
    model = ExitModel(load_model(folder, header, attention=attention), plan.blocks, plan.policy)
    model.heads.load_state_dict(load_file(folder / _WEIGHTS_FILE))
    return model.eval(), plan
