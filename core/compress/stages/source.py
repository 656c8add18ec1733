"""The stage before all others: a source of codes, or with an adapter, is opened, so that everything after it reads plain floats."""

import shutil
import time

from nightpress.core.compress.executors.open_source import adapter_of, open_source
from nightpress.core.compress.stages.job import PressJob
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model

_FOLDER = "opened"


def run(job: PressJob, header: ModelHeader) -> tuple[ModelHeader, list[PassRecord]]:
    """Open the source if it isn't stored as plain floats, and let `job.source` be the opened folder.

    Returns the header of the opened model, and the record of the pass `requantize`. The plan has checked that the recipe allows it. Nothing
    is resumed: it takes about as long as reading the model again.
    """
    adapter = adapter_of(job.brought)
    if header.brought is None and adapter is None:
        return header, []
    began = time.monotonic()
    target = job.work / _FOLDER
    job.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)  # what a killed attempt has left
    opened = open_source(job.brought, target, job.clock.span(0.0, 0.02), adapter=adapter)
    job.source = target
    if opened.adapter is not None:
        job.adapter = opened.adapter.detail
        job.log(f"merged the adapter: {job.adapter}")
    header = inspect_model(FolderFiles(target)).model_copy(update={"brought": header.brought})
    brought = opened.view.brought
    if brought is None or not brought.weights:
        return header, []
    summary = {"from": brought.detail, "weights": brought.weights, "size_bytes": brought.size}
    record = PassRecord(index=0, name="requantize", seconds=time.monotonic() - began, summary=summary)
    return header, [job.publish_pass(record, 0)]
