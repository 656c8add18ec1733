"""A source's outputs are measured by one job, and later jobs of the tenant on the same model read them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, select, update

from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import safetensors
from nightpress.core.compress.export.consumer import Consumer
from nightpress.core.compress.export.task import Task, TimedShape
from nightpress.core.compress.stages import kept_source
from nightpress.core.database import db_now, transaction
from nightpress.core.handoff.report import Report, Subject
from nightpress.core.handoff.source_outputs import FRESH_FILE, KEPT_FILE, processor_class, source_digest
from nightpress.core.handoff.spec import JobSpec
from nightpress.core.ids import new_id
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.service.compose import Resources
from nightpress.core.service.jobs.source_figures import KeptSource, SourceFigures, key_of
from nightpress.core.service.tables.jobs import source_figures
from nightpress.worker.control import Control
from tests.press import lay_out, press
from tests.service import TENANT, Service

QUALITY = {"metric": "masked-lm", "samples": 6, "length": 24}
SPEED = {"metric": "latency", "length": 16, "repeats": 3}
HALF: dict[str, Any] = {
    "name": "half",
    "passes": [{"pass": "magnitude", "sparsity": 0.5}],
    "exports": ["safetensors"],
    "evaluate": [QUALITY, SPEED],
}


# In the child ---------------------------------------------------------------------------------------------------------


def pressed(job_dir: Path, model: Path, recipe: dict[str, Any], kept: Path | None = None) -> Report:
    """Press as a worker's child does that keeps the source's outputs, with those of an earlier job in `kept`."""
    lay_out(job_dir, model, recipe)
    by = ""
    if kept is not None:
        by = "job_earlier"
        (job_dir / "work").mkdir()
        shutil.copyfile(kept, job_dir / "work" / KEPT_FILE)
    JobSpec.load(job_dir).model_copy(update={"keep_source": True, "source_measured_by": by}).save(job_dir)
    return press(job_dir)[1]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path) -> tuple[Report, Path]:
    """The report of a job that has measured its source, and the file with the outputs."""
    folder = tmp_path_factory.mktemp("first") / "job"
    return pressed(folder, bert_tiny, HALF), folder / "work" / FRESH_FILE


@pytest.fixture(scope="module")
def reused(
    first: tuple[Report, Path], tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path
) -> tuple[Report, Path]:
    """The report of a job that got those outputs, and its folder."""
    folder = tmp_path_factory.mktemp("reused") / "job"
    return pressed(folder, bert_tiny, HALF, first[1]), folder


@pytest.mark.slow
def test_a_later_job_has_the_same_figures_to_the_bit(first: tuple[Report, Path], reused: tuple[Report, Path]):
    measured, (again, folder) = first[0], reused
    assert (measured.source.measurements_by, again.source.measurements_by) == (None, "job_earlier")
    assert again.source.measurements == measured.source.measurements
    (ours,), (theirs,) = again.artifacts, measured.artifacts
    assert ours.measurements == theirs.measurements
    assert ours.verification is not None
    assert theirs.verification is not None
    assert ours.verification.value == theirs.verification.value
    assert not (folder / "work" / FRESH_FILE).exists(), "what was only read is not stored again"
    pages = ((folder / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert all("job_earlier" in page.replace("\\_", "_") for page in pages)


def test_its_speed_is_measured_again_beside_the_artifact(first: tuple[Report, Path], reused: tuple[Report, Path]):
    for report, _ in (first, reused):
        (ours,), (theirs,) = report.source.timings, report.artifacts[0].timings
        assert theirs.speedup is not None
        assert theirs.speedup.by_turns
        assert theirs.speedup.source_p50_ms == ours.p50_ms, "the source's runs are those that took turns"
        assert report.source.peak_memory_bytes
    assert reused[0].source.timings != first[0].source.timings


def test_kept_outputs_are_what_the_figures_are_made_of(first: tuple[Report, Path], tmp_path: Path, bert_tiny: Path):
    """If the file says that the source always chose token 0, no hidden word was guessed."""
    _, kept = first
    with np.load(kept) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["quality0.top1"] = np.zeros_like(arrays["quality0.top1"])
    changed = tmp_path / "changed.npz"
    np.savez(changed, **arrays)
    reused = pressed(tmp_path / "job", bert_tiny, HALF, changed)
    assert next(found.value for found in reused.source.measurements if found.name == "masked_accuracy") == 0


def examples(model: Path, **changes: Any) -> Task:
    recipe = parse_recipe({**HALF, "evaluate": [{**QUALITY, **changes}]})
    return quality.prepare(recipe, inspect_model(FolderFiles(model)), model, {}, threads=1).task


def test_outputs_that_do_not_fit_are_not_read(first: tuple[Report, Path], tmp_path: Path, bert_tiny: Path):
    kept, unfit, task = first[1], tmp_path / "unfit.npz", examples(bert_tiny)
    found = kept_source.read(kept, task)
    assert found is not None
    assert kept_source.read(kept, examples(bert_tiny, samples=5)) is None
    assert kept_source.read(kept, examples(bert_tiny, length=16)) is None
    assert kept_source.read(unfit, task) is None, "there is no such file"
    for size in (0, 100, kept.stat().st_size // 2):
        unfit.write_bytes(kept.read_bytes()[:size])
        assert kept_source.read(unfit, task) is None
    np.savez(unfit, some=np.zeros(3))
    assert kept_source.read(unfit, task) is None
    with np.load(kept) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    np.savez(unfit, **(arrays | {"check.values": np.array([{}], object)}))
    assert kept_source.read(unfit, task) is None, "a pickle could run code"


def test_a_source_that_is_only_timed_leaves_the_artifact_its_examples(tmp_path: Path, bert_tiny: Path):
    """On a GPU, the process of a source whose outputs are kept starts first, and it has no examples."""
    task = replace(examples(bert_tiny), shapes=(TimedShape(1, 16, 3),))
    for part in (task.only_timed, task):
        with Consumer(safetensors.CONSUMER, bert_tiny, part, name="m", scratch=tmp_path) as consumer:
            found = consumer.run()
    assert found.outputs.keys() >= {"check.values", "quality0.top1"}


@pytest.mark.slow
def test_a_job_measures_its_source_if_the_outputs_can_not_be_read(
    first: tuple[Report, Path], tmp_path: Path, bert_tiny: Path
):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(first[1].read_bytes()[:500])
    measured = pressed(tmp_path / "job", bert_tiny, HALF, damaged)
    assert measured.source.measurements_by is None
    assert measured.source.measurements == first[0].source.measurements
    assert (tmp_path / "job" / "work" / FRESH_FILE).exists()


@pytest.mark.slow
def test_a_source_that_nothing_took_turns_with_is_timed_alone(tmp_path: Path, bert_tiny: Path):
    """A limit of the job's memory that does not hold both processes: then each is timed alone."""
    lay_out(tmp_path / "job", bert_tiny, HALF)
    JobSpec.load(tmp_path / "job").model_copy(update={"memory_limit": 10**6}).save(tmp_path / "job")
    _, report, _ = press(tmp_path / "job")
    (timing,), (ours,) = report.source.timings, report.artifacts[0].timings
    assert ours.speedup is not None
    assert not ours.speedup.by_turns
    assert ours.speedup.source_p50_ms == timing.p50_ms


# What makes two sources the same ---------------------------------------------------------------------------------------

DATA = {"rows": "sha256:" + "1" * 64}
ASKED = {**HALF, "evaluate": [{**QUALITY, "data": "rows"}, SPEED]}


def digest_of(recipe: dict[str, Any], **changes: Any) -> str:
    given: dict[str, Any] = {
        "tenant_id": "a",
        "model_digest": "sha256:" + "2" * 64,
        "data": DATA,
        "device": "x86_64 avx2",
        "engine": "1/1",
    }
    return source_digest(parse_recipe(recipe), **(given | changes))


def test_passes_exports_gates_and_timings_change_nothing():
    same = {
        "name": "other",
        "passes": [{"pass": "dynamic-int8"}],
        "exports": ["onnx"],
        "evaluate": [{**SPEED, "repeats": 9}, ASKED["evaluate"][0]],
        "gates": {"size": "<= 50%"},
    }
    assert digest_of(ASKED) == digest_of(same)


def test_a_data_set_under_another_name_is_the_same():
    renamed = {**ASKED, "evaluate": [{**QUALITY, "data": "renamed"}]}
    assert digest_of(ASKED) == digest_of(renamed, data={"renamed": DATA["rows"]})


@pytest.mark.parametrize(
    "change",
    [
        {"tenant_id": "b"},
        {"model_digest": "sha256:" + "3" * 64},
        {"data": {"rows": "sha256:" + "4" * 64}},
        {"device": "NVIDIA H200"},
        {"engine": "1/2"},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_another_tenant_model_data_device_or_engine_is_another_source(change: dict[str, Any]):
    assert digest_of(ASKED) != digest_of(ASKED, **change)


@pytest.mark.parametrize("change", [{"samples": 7}, {"length": 32}, {"metric": "fidelity"}], ids=str)
def test_another_evaluation_is_another_source(change: dict[str, Any]):
    assert digest_of(ASKED) != digest_of({**ASKED, "evaluate": [{**QUALITY, "data": "rows", **change}]})
    assert digest_of(ASKED) != digest_of({**ASKED, "seed": 1})


def test_another_version_of_a_library_is_another_source(monkeypatch: pytest.MonkeyPatch):
    before = digest_of(ASKED)
    monkeypatch.setattr("nightpress.core.handoff.source_outputs.version", lambda name: f"{name} of tomorrow")
    assert digest_of(ASKED) != before


def test_what_an_instruction_set_may_not_do_makes_another_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nightpress.core.processor._processor_flags", lambda: {"avx2", "avx512f"})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    whole = processor_class()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert processor_class() != whole


# In SQL and storage ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_row_is_taken_replaced_and_outdated(engine: Engine):
    sources = SourceFigures(engine)
    assert sources.take("d") is None
    first, second = KeptSource("job_1", "a" * 64, 5), KeptSource("job_2", "b" * 64, 6)
    owner = {"tenant_id": "a", "model_digest": "sha256:1"}
    assert sources.put("d", first, **owner) is None
    assert sources.take("d") == first
    assert sources.put("d", second, **owner) == first.sha256
    assert sources.take("d") == second
    assert sources.put("d", second, **owner) is None, "the same bytes replace nothing"
    for other in ({"tenant_id": "b", "model_digest": "sha256:1"}, {"tenant_id": "a", "model_digest": "sha256:2"}):
        sources.outdate(**other)
    assert sources.take("d") == second
    sources.outdate(**owner)
    assert sources.take("d") is None
    assert sources.put("d", first, **owner) == second.sha256
    assert sources.take("d") == first


def test_what_nobody_uses_is_due(engine: Engine):
    sources = SourceFigures(engine)
    for name in ("old", "used", "outdated"):
        owner = {"tenant_id": "a", "model_digest": f"sha256:{name}"}
        sources.put(name, KeptSource("job_1", "a" * 64, 5), **owner)
    with transaction(engine) as connection:
        connection.execute(update(source_figures).values(used_at=db_now(-100)))
    assert sources.take("used") is not None
    assert sources.take("outdated") is not None
    sources.outdate("a", "sha256:outdated")
    assert sorted(sources.due(50)) == ["old", "outdated"]
    for name in ("old", "used", "outdated"):
        sources.prune(name, 50)
    with transaction(engine, read_only=True) as connection:
        assert connection.execute(select(source_figures.c.digest)).scalars().all() == ["used"]


def test_the_control_process_deletes_what_is_due(tmp_path: Path, sqlite_url: str):
    service = Service(tmp_path, sqlite_url)
    resources = Resources(service.settings, service.engine)
    for digest in ("old", "new"):
        service.objects.put_bytes(key_of(digest, "a" * 64), b"outputs")
        resources.store.sources.put(
            digest, KeptSource("job_1", "a" * 64, 7), tenant_id="a", model_digest=f"sha256:{digest}"
        )
    resources.store.sources.outdate("a", "sha256:old")
    control = Control(resources, lambda _queue: None)
    control._sweep_sources()
    control.close()
    assert [entry.key for entry in service.objects.list("sources")] == [key_of("new", "a" * 64)]
    assert resources.store.sources.take("new") is not None
    service.close()


# In a worker ----------------------------------------------------------------------------------------------------------


def ran(service: Service, behaviour: str | None = "measures", **more: Any) -> Subject:
    """Run a job to its end. Returns the source of its report."""
    job_id = service.submit(HALF, **more)
    slot, _ = service.slot(behaviour, memory=4 * 1024**3)
    slot.serve()
    tenant = more.get("tenant_id", TENANT)
    job = service.job(job_id, tenant)
    assert job.state == "succeeded", f"{job.error}\n{service.log(job_id)}"
    service.check_invariants(job_id, tenant)
    report = service.store.reader.report(job_id)
    assert report is not None
    return Subject.model_validate(report["source"]).model_copy(update={"name": job_id})


@pytest.mark.slow
def test_a_second_job_gets_what_the_first_has_stored(tmp_path: Path, sqlite_url: str):
    service = Service(tmp_path, sqlite_url)
    first = ran(service)
    assert first.measurements_by is None
    again = ran(service)
    assert (again.measurements_by, again.notes) == (first.name, (f"measured by {first.name}",))
    service.store.sources.outdate(TENANT, service.model_digest)
    anew = ran(service)
    assert anew.measurements_by is None
    assert ran(service).measurements_by == anew.name
    keys = [entry.key for entry in service.objects.list("sources")]
    assert len(keys) == 1, "what was replaced is deleted"
    service.objects.delete_prefix("sources")
    assert ran(service).measurements_by is None, "a lost object costs only time"
    service.close()


@pytest.mark.slow
def test_tenants_do_not_share_and_other_weights_are_measured(tmp_path: Path, sqlite_url: str):
    service = Service(tmp_path, sqlite_url)
    ran(service)
    assert ran(service, tenant_id="stranger").measurements_by is None
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"other weights")
    service.model_id, service.model_digest = service.register(new_id("mdl"), other)
    assert ran(service).measurements_by is None
    service.close()


@pytest.mark.slow
def test_an_installation_may_keep_none(tmp_path: Path, sqlite_url: str):
    service = Service(tmp_path, sqlite_url, keep_source_days=0)
    assert [ran(service).measurements_by for _ in range(2)] == [None, None]
    assert not list(service.objects.list("sources"))
    service.close()


@pytest.mark.slow
def test_a_failed_job_leaves_what_it_has_measured(tmp_path: Path, sqlite_url: str):
    service = Service(tmp_path, sqlite_url)
    job_id = service.submit(HALF, max_failures=1)
    slot, _ = service.slot("measures_and_fails")
    slot.serve()
    assert service.job(job_id).state == "failed"
    assert ran(service).measurements_by == job_id
    service.close()


@pytest.mark.parametrize("trick", ["measures_a_link", "measures_a_pipe", "measures_too_much"])
@pytest.mark.slow
def test_a_child_can_not_make_the_worker_store_something_else(trick: str, tmp_path: Path, sqlite_url: str):
    service = Service(tmp_path, sqlite_url)
    assert ran(service, trick).measurements_by is None
    assert not list(service.objects.list("sources"))
    service.close()


@pytest.mark.slow
def test_a_real_job_reads_what_a_real_job_has_measured(tmp_path: Path, sqlite_url: str, bert_tiny: Path):
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20)
    service.model_id, service.model_digest = service.register(new_id("mdl"), bert_tiny)
    first, second = ran(service, None), ran(service, None)
    assert (first.measurements_by, second.measurements_by) == (None, first.name)
    assert first.measurements == second.measurements
    assert json.loads(first.model_dump_json())["timings"]
    service.close()
