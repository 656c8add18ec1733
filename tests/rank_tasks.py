"""Functions that tests run in several processes: see core/compress/ranks. They are imported there, so this file imports little."""

import os
import signal
from pathlib import Path
from typing import Any

import torch

from nightpress.core.compress.ranks.group import Group


def fails(error: BaseException, *, group: Group, tell: Any) -> None:
    """The second process fails, and the first waits for it."""
    if group.rank == 1:
        raise error
    group.collect(0)


def waits(*, group: Group, tell: Any) -> None:
    """The second process never comes."""
    if group.rank == 1:
        signal.pause()
    group.collect(0)


def influence_of(source: Path, ids: torch.Tensor, *, context: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The influence of each block, and the saliency of each mixture's experts."""
    from nightpress.core.compress.executors.survey import survey

    seen = list(survey(source, {"input_ids": ids}, context, None))
    saliency = {prefix: sizes for block in seen for prefix, sizes in block.saliency.items()}
    return [block.influence for block in seen], saliency


def exchanges(*, group: Group, tell: Any) -> dict[str, Any]:
    """What each kind of exchange brings the first process: every process gives its rank plus one."""
    own = group.rank + 1.0
    total, largest = torch.full((2, 3), own), torch.full((2,), own)
    group.sum(total.T)
    group.largest(largest)
    rows = group.join_rows(torch.full((len(range(3)[group.share(3)]), 2), own, dtype=torch.float16), 3)
    merged = group.merge({f"of {group.rank}": torch.full((2,), own, dtype=torch.bfloat16)}, torch.device("cpu"))
    last = torch.tensor([group.rank == 1, False])
    group.hand_round(last, owner=1)
    tell("progress", 0.5, "half")
    return {
        "total": total.tolist(),
        "largest": largest.tolist(),
        "rows": rows.tolist(),
        "merged": {name: tensor.tolist() for name, tensor in merged.items()},
        "last": last.tolist(),
        "pids": group.collect(os.getpid()),
    }


def held_by_experts(source: Path, ids: torch.Tensor, *, context: Any) -> list[tuple[int, int, int]]:
    """By process: the bytes of the experts' statistics, of their weights as read, and of their weights in the block's modules."""
    from nightpress.core.compress.executors.blocks.press import _run
    from nightpress.core.compress.passes.calibrated import Quantized
    from nightpress.core.recipes.passes import Gptq
    from tests.block_models import linears_of

    blocks: dict[int, list[int]] = {}

    class Weighing(Quantized):
        def settle(self, block: Any, inputs: Any, device: torch.device) -> Any:
            grams = [seen.statistic for seen in inputs if ".experts." in seen.names[0]]
            held = [tensor for name, tensor in block.items() if ".experts." in name]
            loaded = [tensor for name, tensor in block.module.named_parameters() if ".experts." in name]
            sizes = blocks.setdefault(id(block.module), [0, 0, 0])
            sizes[0] += sum(gram.matrix().nbytes for gram in grams)
            sizes[1] += sum(tensor.nbytes for tensor in held)
            sizes[2] = sum(tensor.nbytes for tensor in loaded if not tensor.is_meta)
            return super().settle(block, inputs, device)

    options = Gptq(group_size=16)
    method = Weighing(options, options.scheme)
    target = context.work_dir / "passes"
    given = (source, target, method, {"input_ids": ids}, linears_of(source), "weighing", {}, None, None, 1)
    _run(*given, context=context)
    return [
        tuple(sizes) for sizes in context.group.collect([max(sizes) for sizes in zip(*blocks.values(), strict=True)])
    ]


def asks_experts(chosen: list[list[int]], most: int, *, group: Group, tell: Any) -> list[list[tuple[int, list[float]]]]:
    """Each process asks experts that multiply by their number plus one. chosen: by process, the expert of each of its tokens.

    most: tokens of a round of several experts.
    """
    from nightpress.core.compress.model import expert_exchange

    expert_exchange.EXCHANGED_TOKENS = most
    exchange = expert_exchange.ExpertExchange(group, 5)
    own = torch.tensor(chosen[group.rank], dtype=torch.long)
    hidden = (100.0 * group.rank + torch.arange(len(own)))[:, None]
    tokens = [(own == expert).nonzero()[:, 0] for expert in range(5)]

    def run(expert: int, rows: torch.Tensor) -> torch.Tensor:
        assert expert in exchange.own
        assert len(rows)
        return rows * (expert + 1)

    answers = [(expert, made[:, 0].tolist()) for expert, made in exchange.answers(hidden, tokens, run)]
    seen: list[float] = []
    exchange.show_all(hidden, [group.rank], lambda _, rows: seen.extend(rows[:, 0].tolist()))
    return group.collect([*answers, (-1, seen)])


def share_out_all(*, group: Group, tell: Any) -> None:
    """Let this process treat every model as large: parameters are shared out block by block, frozen ones and the teacher's, too."""
    from nightpress.core.compress.executors import sharded

    sharded.SHARED_OUT_BYTES = sharded._REPLICATED = 0
