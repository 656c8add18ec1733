"""The files of a run: a shard and a record for each block. They show which blocks an earlier attempt finished.

An attempt resumes after the last finished block. The finished blocks run with the weights of their files. An uninterrupted run uses the
same weights, so the blocks after them become the same to the last byte.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from nightpress.core.compress.executors.blocks.method import RunResult
from nightpress.core.compress.executors.blocks.plan import BlockPlan
from nightpress.core.compress.executors.blocks.settle import BlockOutcome
from nightpress.core.compress.executors.rewrite import Effect
from nightpress.core.compress.model.checkpoint import read_shard, read_shards, write_file, write_index
from nightpress.core.compress.model.source import SourceTensors


@dataclass(frozen=True)
class BlockRecord:
    """The report of a settled block."""

    effects: tuple[tuple[str, Effect], ...]  #: by weight
    unseen: tuple[str, ...]
    undersampled: tuple[tuple[str, int], ...]
    warnings: tuple[str, ...]
    figures: tuple[tuple[str, float], ...]


def record_of(outcome: BlockOutcome) -> BlockRecord:
    """The record of a block's outcome, limited to the weights that the method settled."""
    written = outcome.written
    return BlockRecord(
        effects=tuple((name, final.effect) for name, final in written.items() if final.effect is not None),
        unseen=tuple(name for name in outcome.unseen if name in written),
        undersampled=tuple((name, count) for name, count in outcome.undersampled if name in written),
        warnings=outcome.warnings,
        figures=outcome.figures,
    )


@dataclass(frozen=True)
class RunFiles:
    """The paths of a run's shards and records."""

    target: Path
    records: Path  #: a folder for the records of this plan only
    blocks: int

    def rest(self) -> Path:
        """The shard of the tensors that are in no block."""
        return self._shard(0)

    def block(self, index: int) -> Path:
        return self._shard(index + 1)

    def record(self, index: int) -> Path:
        return self.records / f"block-{index:05}.json"

    def _shard(self, number: int) -> Path:
        return self.target / f"model-{number + 1:05}-of-{self.blocks + 1:05}.safetensors"

    def finished(self) -> int:
        """The number of blocks, from the first on, that an earlier attempt finished."""
        for index in range(self.blocks):
            record, shard = self.record(index), self.block(index)
            if not record.exists() or not shard.exists():
                return index
            if json.loads(record.read_bytes())["size"] != shard.stat().st_size:
                return index
        return self.blocks

    def read_block(self, index: int, holds: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors of a finished block that this process holds, as they were written."""
        written = SourceTensors((read_shard(self.block(index)),))
        return {name: written.read(name) for name in written.names() if holds(name)}

    def write_record(self, index: int, record: BlockRecord) -> None:
        """Write the record that marks a block as finished. Its shard must be on disk."""
        body = {
            "size": self.block(index).stat().st_size,
            "effects": {name: asdict(effect) for name, effect in record.effects},
            "unseen": record.unseen,
            "undersampled": dict(record.undersampled),
            "warnings": record.warnings,
            "figures": dict(record.figures),
        }
        write_file(self.record(index), json.dumps(body).encode())

    def read_record(self, index: int) -> BlockRecord:
        body = json.loads(self.record(index).read_bytes())
        return BlockRecord(
            effects=tuple((name, Effect(**effect)) for name, effect in body["effects"].items()),
            unseen=tuple(body["unseen"]),
            undersampled=tuple(body["undersampled"].items()),
            warnings=tuple(body["warnings"]),
            figures=tuple(body["figures"].items()),
        )


def run_files(target: Path, work_dir: Path, plan: BlockPlan) -> RunFiles:
    """Make the folders of a run."""
    target.mkdir(parents=True, exist_ok=True)
    records = work_dir / "blocks" / plan.digest
    records.mkdir(parents=True, exist_ok=True)
    return RunFiles(target, records, plan.blocks)


def conclude(files: RunFiles, source: SourceTensors, outside: Mapping[str, Effect]) -> RunResult:
    """Write the index of all shards, and merge the records. outside: the effects on tensors that are in no block."""
    write_index(files.target)
    sizes = {stored.name: stored.info.size for shard in read_shards(files.target) for stored in shard.tensors}
    records = [files.read_record(index) for index in range(files.blocks)]
    effects = {**outside, **dict(pair for record in records for pair in record.effects)}
    return RunResult(
        effects=effects,
        bytes_after={
            name: sum(size for other, size in sizes.items() if other == name or other.startswith(name + "_"))
            for name in effects
        },
        unseen=tuple(name for record in records for name in record.unseen),
        undersampled=dict(pair for record in records for pair in record.undersampled),
        kept=tuple(
            name
            for name in source.names()
            if name not in effects and name.endswith(".weight") and len(source.stored(name).info.shape) == 2
        ),
        warnings=dict(Counter(text for record in records for text in record.warnings)),
        figures=_by_name(records),
    )


def _by_name(records: Sequence[BlockRecord]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for index, record in enumerate(records):
        for name, value in record.figures:
            found.setdefault(name, {})[index] = value
    return found
