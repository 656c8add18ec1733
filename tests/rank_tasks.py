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
