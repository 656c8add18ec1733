"""The stream executor: rewrites a model folder of any size into another folder, in chunks of rows."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.overlap import ShardJob, Sweep, plan_shard
from nightpress.core.compress.executors.rewrite import Effect, Put, Rewrite, becomes
from nightpress.core.compress.grids.workspace import Workspace
from nightpress.core.compress.model.checkpoint import (
    Shard,
    StoredTensor,
    read_shards,
    write_file,
    write_index,
)
from nightpress.core.recipes.header import TensorInfo


@dataclass(frozen=True)
class SweepResult:
    """The effects and the output tensors of a sweep, by source tensor, in the order of the files."""

    effects: dict[str, Effect]
    outputs: dict[str, tuple[TensorInfo, ...]]


def sweep(
    source: Path,
    target: Path,
    choose: Callable[[TensorInfo], Rewrite | None],
    context: PassContext,
    *,
    recipe: str,
    span: tuple[float, float] = (0.0, 1.0),
) -> SweepResult:
    """Rewrite the tensors for which `choose` returns a rewrite, and copy the rest. Writes all shards and their index to `target`.

    `recipe` identifies what is done, e.g. as JSON: a shard that an earlier attempt finished with the same recipe is not done again.
    `span`: the sweep's part of the pass's progress, (start, end).
    """
    target.mkdir(parents=True, exist_ok=True)
    shards = read_shards(source)
    records = context.work_dir / "swept" / hashlib.sha256(f"{recipe}\n{target.name}".encode()).hexdigest()[:16]
    records.mkdir(parents=True, exist_ok=True)
    effects: dict[str, dict[str, Effect]] = {}
    jobs: list[ShardJob] = []
    for shard in shards:
        done = _finished(records, target, shard)
        if done is None:
            jobs.append(plan_shard(shard, choose))
        else:
            effects[shard.path.name] = done
    finished = len(effects)

    def commit(job: ShardJob) -> None:
        nonlocal finished
        assert job.writer is not None
        job.writer.commit()
        effects[job.shard.path.name] = _sum_effects(job)
        record = records / f"{job.shard.path.name}.json"
        _record(record, job, effects[job.shard.path.name])
        finished += 1
        context.whole(finished, target / job.shard.path.name, record)

    Sweep(jobs, context, target, commit, span).run()

    outputs = {stored.name: becomes(stored.info, choose(stored.info)) for shard in shards for stored in shard.tensors}
    write_index(target)
    merged = {name: effect for shard in shards for name, effect in effects[shard.path.name].items()}
    return SweepResult(effects=merged, outputs=outputs)


def scan(
    shards: tuple[Shard, ...],
    names: set[str],
    visit: Callable[[StoredTensor, int, Tensor, Workspace], None],
    context: PassContext,
    *,
    span: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Call `visit` (tensor, first row, rows, workspace) for every chunk of these tensors, in any order and from several threads."""
    visits = {
        stored.name: _ReadOnly(stored, visit) for shard in shards for stored in shard.tensors if stored.name in names
    }
    jobs = [plan_shard(shard, lambda info: visits.get(info.name), copies=False) for shard in shards]
    Sweep([job for job in jobs if job.chunks], context, None, lambda _job: None, span).run()


@dataclass(frozen=True)
class _ReadOnly:
    """A rewrite that writes nothing."""

    stored: StoredTensor
    visit: Callable[[StoredTensor, int, Tensor, Workspace], None]
    outputs: tuple[TensorInfo, ...] = ()
    row_step: int = 1

    def __call__(self, rows: Tensor, first_row: int, put: Put, workspace: Workspace) -> Effect:
        del put
        self.visit(self.stored, first_row, rows, workspace)
        return Effect()


def _sum_effects(job: ShardJob) -> dict[str, Effect]:
    sums: dict[str, Effect] = {}
    for chunk, effect in zip(job.chunks, job.effects, strict=True):
        if effect is not None:
            sums[chunk.stored.name] = sums.get(chunk.stored.name, Effect()) + effect
    return sums


def _record(path: Path, job: ShardJob, effects: dict[str, Effect]) -> None:
    assert job.writer is not None
    body = {
        "source_header": hashlib.sha256(job.shard.header).hexdigest(),
        "size": job.writer.size,
        "effects": {name: asdict(effect) for name, effect in effects.items()},
    }
    write_file(path, json.dumps(body).encode())


def _finished(records: Path, target: Path, shard: Shard) -> dict[str, Effect] | None:
    """The effects of a shard that an earlier attempt finished, or None.

    The record was written after the shard, so the shard of a matching record is complete.
    """
    record, output = records / f"{shard.path.name}.json", target / shard.path.name
    if not record.exists() or not output.exists():
        return None
    body = json.loads(record.read_bytes())
    if body["source_header"] != hashlib.sha256(shard.header).hexdigest() or body["size"] != output.stat().st_size:
        return None
    return {name: Effect(**effect) for name, effect in body["effects"].items()}
