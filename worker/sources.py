"""Brings the outputs of a job's source that an earlier job measured, and stores those that this job has measured.

Nothing here may fail a job, except a full disk: without the outputs, the child measures the source.
"""

import hashlib
import logging
import os
import stat
from pathlib import Path

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.source_outputs import FRESH_FILE, KEPT_FILE, MAX_BYTES, processor_class, source_digest
from nightpress.core.handoff.spec import WORK_DIR
from nightpress.core.recipes.models import Recipe
from nightpress.core.service.jobs.records import Job
from nightpress.core.service.jobs.source_figures import KeptSource, SourceFigures, folder_of, key_of
from nightpress.core.version import ENGINE
from nightpress.worker.checkpoints import open_plain

log = logging.getLogger(__name__)


class SourceKeeper:
    """The kept outputs of one attempt's source."""

    def __init__(
        self, sources: SourceFigures, objects: ObjectStore, job: Job, recipe: Recipe, job_dir: Path, *, gpu: str
    ) -> None:
        """gpu: the name of the GPU on which the job's source is measured; empty: it is measured on the processor."""
        self._sources, self._objects, self._job, self._work = sources, objects, job, job_dir / WORK_DIR
        self._digest = source_digest(
            recipe,
            tenant_id=job.tenant_id,
            model_digest=job.model_digest,
            data={name: str(entry["digest"]) for name, entry in job.data.items()},
            device=gpu or processor_class(),
            engine=ENGINE,
        )

    def bring(self) -> str:
        """Put kept outputs at work/KEPT_FILE. Returns the job that measured them; empty: the source must be measured."""
        try:
            kept = self._sources.take(self._digest)
            if kept is None:
                return ""
            target = self._work / KEPT_FILE
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._objects.get_file(key_of(self._digest, kept.sha256), target, sha256=kept.sha256)
        except NightpressError as error:
            if error.code is ErrorCode.DISK_FULL:
                raise
            log.warning("The kept outputs of the source can't be used, so it is measured: %s", error)
            return ""
        return kept.job_id

    def store(self) -> None:
        """Store the outputs that the child has measured, if it has."""
        try:
            descriptor = open_plain(self._work, FRESH_FILE)
        except OSError:
            return
        try:
            self._store(descriptor)
        except (NightpressError, OSError) as error:
            log.warning("The outputs of the source were not kept for later jobs: %s", error)
        finally:
            os.close(descriptor)

    def _store(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return
        held = Path(f"/proc/self/fd/{descriptor}")
        with held.open("rb") as stream:
            kept = KeptSource(self._job.id, hashlib.file_digest(stream, "sha256").hexdigest(), status.st_size)
        self._objects.put_file(key_of(self._digest, kept.sha256), held, sha256=kept.sha256)
        job = self._job
        replaced = self._sources.put(self._digest, kept, tenant_id=job.tenant_id, model_digest=job.model_digest)
        if replaced is not None:
            self._objects.delete_prefix(f"{folder_of(self._digest)}/{replaced}")
