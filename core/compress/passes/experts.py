"""Expert pruning: a mixture keeps the experts that add most to the hidden states on the calibration text.

Lasby et al., REAP the Experts (arXiv 2510.13999), eq. 9: the saliency of an expert is the mean over its tokens of g(x) · ‖f(x)‖₂, where g is
the router's weight and f the expert's output.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext, over_ranks
from nightpress.core.compress.executors.batches import count_of
from nightpress.core.compress.executors.survey import survey
from nightpress.core.compress.model.checkpoint import write_index, write_json, write_tensors
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.skeleton import Batch
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import ExpertPruning
from nightpress.core.recipes.passes.experts import Place, info_after, places_of

_SHOWN = 4  #: digits of a saliency in the report


@folder_pass(ExpertPruning)
def experts(source: Path, target: Path, options: ExpertPruning, context: PassContext) -> PassRecord:
    """Remove experts from every mixture. `target` becomes a smaller mixture."""
    start = time.monotonic()
    samples = calibration_samples(source, context)
    saliency = over_ranks(_saliency, source, samples, samples=count_of(samples), context=context)
    if not saliency:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            "`experts` can't watch this model's experts: they have biases, or no gate.",
            hint="Leave the pass out.",
        )
    kept = {prefix: strongest(scores, options.kept(len(scores))) for prefix, scores in saliency.items()}
    _copy(source, target, places_of(context.header.tensors, kept))
    copy_companions(source, target)
    path = target / "config.json"
    changed = options.without(context.header, kept).config
    write_json(path, {**json.loads(path.read_bytes()), **changed})
    context.progress(1.0, "done")
    after = inspect_model(FolderFiles(target))
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "experts": len(next(iter(saliency.values()))),
            "kept": {prefix.removesuffix("."): list(numbers) for prefix, numbers in kept.items()},
            "saliency": {
                prefix.removesuffix("."): [float(f"{value:.{_SHOWN}g}") for value in scores.tolist()]
                for prefix, scores in saliency.items()
            },
            "parameters_before": context.header.parameters,
            "parameters_after": after.parameters,
            "bytes_before": context.header.size,
            "bytes_after": after.size,
        },
    )


def _saliency(source: Path, samples: Batch, *, context: PassContext) -> dict[str, Tensor]:
    """By prefix of a mixture's experts: their saliency [experts]."""
    found: dict[str, Tensor] = {}
    for block in survey(source, samples, context, None):
        found |= block.saliency
    return found


def strongest(saliency: Tensor, count: int) -> tuple[int, ...]:
    """The indices of the `count` largest values [experts], ascending. Of equal values the first stay."""
    order = torch.argsort(saliency, descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def _copy(source: Path, target: Path, places: Mapping[str, Place | None]) -> None:
    """Copy all tensors but those of removed experts, shard by shard. The remaining experts are renumbered."""
    target.mkdir(parents=True, exist_ok=True)
    files = SourceTensors.in_folder(source)
    for shard in files.shards:
        copied = {}
        for stored in shard.tensors:
            place = places.get(stored.name, Place(stored.name, None))
            if place is not None:
                copied[stored.name] = place
        infos = [info_after(files.stored(name).info, place) for name, place in copied.items()]
        if not infos:
            continue
        tensors = (
            (place.name, files.read(name) if place.rows is None else files.read(name)[list(place.rows)])
            for name, place in copied.items()
        )
        write_tensors(target / shard.path.name, infos, tensors, shard.metadata)
    write_index(target)
