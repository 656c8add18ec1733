"""The stage of the passes that rewrite a model's folder, one after the other. Each writes a folder of its own below work/."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from nightpress.core.compress import environment
from nightpress.core.compress.model.checkpoint import write_file
from nightpress.core.compress.passes.registry import model_pass
from nightpress.core.compress.ranks.launch import Ranks, can_meet
from nightpress.core.compress.stages.clock import parts
from nightpress.core.compress.stages.job import PressJob, naming_the_package
from nightpress.core.compress.stages.judge import judge_of
from nightpress.core.compress.stages.renumbering import renumbering
from nightpress.core.compress.stages.state import State
from nightpress.core.handoff.checkpoints import FinishedPass, pass_folder, pass_record, prefix_digests
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import PassOptions

RUNNERS = Path(__file__).parents[1] / "runners"


def run(job: PressJob, state: State) -> None:
    """Run the passes. Sets the state's folder and header to those of the last pass, and adds a record of each pass.

    Starts after the last pass that an earlier attempt finished.
    """
    job.clock.enter("pressing")
    digests = _digests(job)
    steps = [(index, options) for index, options in enumerate(job.recipe.passes) if options.stage == "folder"]
    done = _take_over(job, state, steps, digests)
    spans = parts(0.3, 0.5, len(steps))
    for (index, options), (start, end) in list(zip(steps, spans, strict=True))[done:]:
        report = job.clock.span(start, end, pass_index=index)
        report(0.0, f"pass {index + 1}: {options.name}")
        target = job.work / pass_folder(index, options.name)
        with (
            environment.gpu_peak(job.spec.device) as peak,
            naming_the_package(options),
            _ranks(job, index, options) as ranks,
        ):
            context = job.context(state.header, report, index=index, judge=judge_of(job, state, options), ranks=ranks)
            record = model_pass(options)(state.folder, target, options, context)
            peaks = (peak(), None if ranks is None else ranks.peak_gpu_bytes)
            record = record.model_copy(update={"peak_gpu_bytes": max(filter(None, peaks), default=None)})
        state.records.append(job.publish_pass(record, index))
        state.folder = target
        # No pass reads the model of a last pass, e.g. a quantized one. So its header is not needed.
        if options.runner:
            state.header, state.runner = options.leaves(state.header), RUNNERS / options.runner
        elif not options.last:
            state.header = inspect_model(FolderFiles(target))
        _finish(job, state, index, options, digests[index])
    if any(options.renumbers for _, options in steps):
        state.renumbering = renumbering(job.source, state.folder)


@contextlib.contextmanager
def _ranks(job: PressJob, index: int, options: PassOptions) -> Iterator[Ranks | None]:
    """The processes that share out a pass's work; None: the pass runs in this process alone. They end with the pass."""
    count = job.spec.processes
    if count == 1:
        yield None
        return
    why = "" if options.shared_out else "its work is not shared out"
    if not why and not can_meet():
        why = "processes can't connect to each other within this worker's sandbox"
    if why:
        job.warn(f"pass {index + 1} ({options.name}) runs in one process instead of {count}: {why}")
        yield None
        return
    folder = job.work / "ranks"
    with Ranks(count, folder, device=job.spec.device, threads=job.spec.threads) as ranks:
        yield ranks
    shutil.rmtree(folder, ignore_errors=True)


def _digests(job: PressJob) -> list[str]:
    """For each pass, a digest of everything that decides its result, as far as this process knows it."""
    return prefix_digests(
        job.recipe,
        tenant_id="",
        model_digest=job.spec.model_digest,
        data={},
        device=job.spec.device,
        engine=environment.version_of("nightpress"),
    )


def _take_over(job: PressJob, state: State, steps: Sequence[tuple[int, PassOptions]], digests: Sequence[str]) -> int:
    """Load the result of the last pass that an earlier attempt finished. Returns the number of passes that need not run again."""
    for done, (index, options) in reversed(list(enumerate(steps, start=1))):
        earlier = FinishedPass.load(job.work, index, options.name, made_of=digests[index])
        if earlier is not None:
            state.folder, state.header = job.work / pass_folder(index, options.name), earlier.header
            state.records = list(earlier.records)
            state.runner = RUNNERS / options.runner if options.runner else None
            job.log(f"pass {index + 1} ({options.name}) was done before: going on behind it")
            return done
    return 0


def _finish(job: PressJob, state: State, index: int, options: PassOptions, digest: str) -> None:
    """Record and checkpoint a finished pass, for later attempts and for other jobs that begin with the same passes."""
    record = job.work / pass_record(index, options.name)
    files = sorted(path for path in state.folder.rglob("*") if path.is_file())
    done = FinishedPass(
        made_of=digest,
        files={path.relative_to(state.folder).as_posix(): path.stat().st_size for path in files},
        header=state.header,
        records=tuple(state.records),
    )
    write_file(record, done.model_dump_json().encode())
    for step, path in enumerate((*files, record)):
        job.checkpoint(index, path.relative_to(job.work).as_posix(), step)
