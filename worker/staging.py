"""Copies the model and data sets from the registry into a job's folder, and the results from the folder to storage."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sqlalchemy import Engine

from nightpress.core.artifacts.storage import ObjectStore, OnBytes
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import MANIFEST_FILE, FileEntry, Manifest, digest_of
from nightpress.core.handoff.report import REPORT_FILE, Report, Subject
from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR
from nightpress.core.recipes.inspect import FolderFiles
from nightpress.core.service.jobs.records import Job, Lease, MetricRow, Succeeded
from nightpress.core.service.registry.contents import Contents, data_set_contents, model_contents
from nightpress.worker import landlock
from nightpress.worker.cache import BlobCache, full_worker_disk, stage_in_place
from nightpress.worker.fitness import MachineFaultError

_MAX_MANIFEST_BYTES = 16 * 1024**2
_MAX_REPORT_BYTES = 64 * 1024**2


class Stager:
    """Provides the input files of a job. Files on this machine are linked in place if possible. All bytes are hashed."""

    def __init__(self, engine: Engine, objects: ObjectStore, cache: BlobCache) -> None:
        self._engine = engine
        self._objects = objects
        self._cache = cache

    def stage(self, job: Job, job_dir: Path, *, on_total: Callable[[int], None], on_bytes: OnBytes) -> dict[str, str]:
        """Fill source/ and data/. Returns the data set's name in the recipe → its file's name in data/.

        `on_total` is called with the total number of bytes, `on_bytes` with each increment. Either may raise to stop.
        Raises MachineFaultError if a server path does not exist on this machine.
        """
        model = model_contents(self._engine, job.model_id)
        if digest_of([file for part in model for file in part.placed()]) != job.model_digest:
            raise NightpressError(
                ErrorCode.CHECKSUM_MISMATCH,
                f"The model {job.model_name} is not the one the job was submitted for.",
                hint="Register the model again and submit the job for it.",
            )
        data = {name: data_set_contents(self._engine, str(row["id"])) for name, row in job.data.items()}
        on_total(sum(file.size for source in (*model, *data.values()) for file in source.files))
        for part in model:
            for file in part.files:
                self._bring(part, file, job_dir / SOURCE_DIR / part.folder / file.path, on_bytes)
        names = {}
        for index, (name, source) in enumerate(data.items()):
            (file,) = source.files
            names[name] = f"{index}-{PurePosixPath(file.path).name}"
            self._bring(source, file, job_dir / DATA_DIR / names[name], on_bytes)
        return names

    def _bring(self, source: Contents, file: FileEntry, target: Path, on_bytes: OnBytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.server_path is not None:
            # Resolve links now, because they may have changed since. A hard link to a symbolic link would not work for the child.
            lies_in = source.server_path
            if not lies_in.exists():
                raise _path_missing(lies_in)
            path = FolderFiles(lies_in).path(file.path) if lies_in.is_dir() else lies_in.resolve()
            # Without Landlock, a child could write through the hard link into the operator's file.
            link = landlock.version() > 0
            stage_in_place(path, file.sha256, file.size, target, link=link, on_bytes=on_bytes)
            return
        key = f"{source.prefix}/{file.path}"

        def fetch(path: Path) -> None:
            self._objects.get_file(key, path, sha256=file.sha256, on_bytes=on_bytes)

        self._cache.take(file.sha256, file.size, target, fetch, on_bytes=on_bytes)


def _path_missing(path: Path) -> MachineFaultError:
    """A fault of the machine, because another worker may have the folder: the mount may be missing only here."""
    return MachineFaultError(
        ErrorCode.NOT_FOUND,
        f"{path}, where the files were registered, does not exist on this worker's machine.",
        hint="Mount the folder at the same path on every worker of this queue, or upload the files.",
        reason=f"this machine has no {path}",
    )


def read_manifest(job_dir: Path, lease: Lease) -> Manifest:
    """The manifest that the child wrote. Raises internal if it is missing, invalid, or belongs to another attempt."""
    try:
        manifest = Manifest.model_validate_json(_read(job_dir, MANIFEST_FILE, _MAX_MANIFEST_BYTES))
    except (OSError, ValueError) as error:
        raise _bad_output(f"its manifest can't be read: {error}") from error
    if (manifest.job_id, manifest.attempt) != (lease.job_id, lease.attempt):
        raise _bad_output("its manifest is another attempt's")
    return manifest


def files_of(manifest: Manifest) -> list[FileEntry]:
    """Every file of a manifest, with its path relative to out/."""
    return [
        file.model_copy(update={"path": f"{artifact.path}/{file.path}"})
        for artifact in manifest.artifacts
        for file in artifact.files
    ] + list(manifest.report)


def ship(job_dir: Path, manifest: Manifest, objects: ObjectStore, *, on_bytes: OnBytes) -> None:
    """Upload every file of the manifest, and the manifest last. The files are not visible to users before the job's commit."""
    prefix = f"jobs/{manifest.job_id}/attempts/{manifest.attempt}"
    with full_worker_disk():
        for file in files_of(manifest):
            path = _plain_file(job_dir, file.path)
            if path.stat().st_size != file.size:
                raise _bad_output(f"{file.path} has not the size in its manifest")
            objects.put_file(f"{prefix}/{file.path}", path, sha256=file.sha256, on_bytes=on_bytes)
    objects.put_bytes(f"{prefix}/{MANIFEST_FILE}", manifest.model_dump_json().encode())


def outcome_of(job_dir: Path, manifest: Manifest) -> Succeeded:
    """The report and its metrics, in the form that is stored in SQL. Raises internal if the report is missing or invalid."""
    try:
        report = Report.model_validate_json(_read(job_dir, REPORT_FILE, _MAX_REPORT_BYTES))
    except (OSError, ValueError) as error:
        raise _bad_output(f"its report can't be read: {error}") from error
    metrics = [row for subject in (report.source, *report.artifacts) for row in _metrics(subject)]
    return Succeeded(manifest.verdict, manifest, report.model_dump(mode="json"), metrics)


def _metrics(subject: Subject) -> list[MetricRow]:
    rows = [MetricRow(subject.name, "size", subject.size_bytes, "bytes")]
    if subject.peak_memory_bytes is not None:
        rows.append(MetricRow(subject.name, "peak_memory", subject.peak_memory_bytes, "bytes"))
    if subject.peak_gpu_bytes is not None:
        rows.append(MetricRow(subject.name, "peak_gpu_memory", subject.peak_gpu_bytes, "bytes"))
    rows += [
        MetricRow(subject.name, measured.name, measured.value, measured.unit, measured.low, measured.high)
        for measured in subject.measurements
    ]
    rows += [
        MetricRow(subject.name, f"{ranked.name}[{part.name}]", ranked.value, ranked.unit, ranked.low, ranked.high)
        for part in subject.slices
        if (ranked := part.ranked) is not None
    ]
    for timing in subject.timings:
        shape = f"{timing.batch}x{timing.length}"
        rows.append(MetricRow(subject.name, f"latency_{shape}", timing.p50_ms, "ms"))
        rows.append(MetricRow(subject.name, f"throughput_{shape}", timing.throughput, timing.throughput_unit))
    for writing in subject.generation:
        shape = f"{writing.batch}x{writing.prompt}"
        rows.append(MetricRow(subject.name, f"prefill_{shape}", writing.prefill_tokens_per_s, "tokens/s"))
        rows.append(
            MetricRow(
                subject.name,
                f"decode_{shape}",
                writing.decode_tokens_per_s,
                "tokens/s",
                writing.decode_slowest,
                writing.decode_fastest,
            )
        )
    return rows


def _read(job_dir: Path, name: str, limit: int) -> bytes:
    path = _plain_file(job_dir, name)
    if path.stat().st_size > limit:
        raise ValueError(f"{name} has {path.stat().st_size} bytes; {limit} are allowed")
    return path.read_bytes()


def _plain_file(job_dir: Path, name: str) -> Path:
    """A regular file below out/. Raises internal if its path has a symbolic link, so that the child can't make us read other files."""
    path = job_dir
    for part in (OUT_DIR, *PurePosixPath(name).parts):
        path = path / part
        if path.is_symlink():
            raise _bad_output(f"{name} is, or lies behind, a symbolic link")
    if not path.is_file():
        raise _bad_output(f"{name} is missing or no regular file")
    return path


def _bad_output(what: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INTERNAL, f"The child's result is not usable: {what}.", hint="The job's log says more."
    )
