"""The stage before all others: a source that is stored as codes is opened, so that everything after it reads floats."""

import shutil
import time

from nightpress.core.compress.executors.open_source import open_source
from nightpress.core.compress.stages.job import PressJob
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader

_FOLDER = "opened"


def run(job: PressJob, header: ModelHeader) -> list[PassRecord]:
    """Open the source, if it isn't stored as plain floats, and let `job.source` be the opened folder. Returns the record of the pass.

    The plan has checked that the recipe allows it. Nothing is resumed: decoding takes about as long as reading the model again.
    """
    if header.brought is None:
        return []
    began = time.monotonic()
    target = job.work / _FOLDER
    job.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)  # what a killed attempt has left
    view = open_source(job.source, target, job.clock.span(0.0, 0.02))
    job.source = target
    if not view.weights:
        return []
    summary = {"from": view.brought.detail, "weights": view.brought.weights, "size_bytes": view.brought.size}
    record = PassRecord(index=0, name="requantize", seconds=time.monotonic() - began, summary=summary)
    return [job.publish_pass(record, 0)]
