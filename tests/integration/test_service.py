"""From a person's request to a job: names, plans, refusals and retries, with a real registry."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, update

from nightpress.core.artifacts.open import open_store
from nightpress.core.database import db_now, make_engine, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.models import Recipe
from nightpress.core.service.access.quotas import QuotaBook
from nightpress.core.service.jobs.records import Worker
from nightpress.core.service.jobs.service import JobService
from nightpress.core.service.jobs.source_figures import KeptSource
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.tables.jobs import workers
from nightpress.core.settings import Settings
from nightpress.core.wire.jobs import JobCreate
from nightpress.core.wire.models import DataSetCreate, FileAnnouncement, ModelCreate
from tests.jobs import GB, age, claim, host, succeeded

TENANT = "default"
RECIPE: dict[str, Any] = {"name": "half", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"]}


class World:
    """A service with a registered model, as one API process has it."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.settings, self.engine = settings, engine
        objects = open_store(settings)
        self.models = ModelRegistry(engine, objects, settings)
        self.data_sets = DataSetRegistry(engine, objects, settings)
        self.store = JobStore(engine)
        self.service = self.fresh()

    def fresh(self, **changes: Any) -> JobService:
        """A service as in another process, with empty caches."""
        settings = self.settings.model_copy(update=changes)
        return JobService(self.store, self.models, self.data_sets, QuotaBook(self.engine, settings), settings)


@pytest.fixture
def world(sql_url: str, tmp_path: Path, bert_tiny: Path) -> Iterator[World]:
    roots = [bert_tiny.parent, tmp_path / "data"]
    roots[1].mkdir()
    settings = Settings(data_dir=tmp_path / "home", model_roots=roots, max_queued_jobs=20)
    engine = make_engine(sql_url)
    world = World(engine, settings)
    world.models.create(TENANT, ModelCreate(name="tiny", path=str(bert_tiny)))
    yield world
    engine.dispose()


def wanted(**changes: Any) -> JobCreate:
    return JobCreate.model_validate({"model": "tiny", "recipe": RECIPE} | changes)


def refusal(service: JobService, request: JobCreate, **kwargs: Any) -> NightpressError:
    with pytest.raises(NightpressError) as raised:
        service.submit(kwargs.pop("tenant", TENANT), request, **kwargs)
    return raised.value


def test_a_request_becomes_a_job_that_says_everything_a_worker_needs(world: World):
    job, created = world.service.submit(TENANT, wanted(labels={"team": "search"}, priority=3, run_limit_s=60.0))
    model = world.models.get(TENANT, "tiny")
    assert created
    assert (job.model_id, job.model_name, job.model_digest) == (model.id, "tiny", model.digest)
    assert (job.queue, job.priority, job.run_limit_s, job.stall_s) == ("cpu", 3, 60.0, world.settings.stall_s)
    assert job.max_failures == world.settings.max_failures
    assert job.needs_memory > 100_000_000
    stored = world.store.reader.get(TENANT, job.id)
    assert stored == job
    recipe = Recipe.model_validate(job.recipe)
    assert recipe.passes[0].pass_ == "magnitude"
    assert json.loads(recipe.model_dump_json()) == job.recipe, "normalised: reading and writing it changes nothing"


def test_a_recipe_can_be_named(world: World):
    job, _ = world.service.submit(TENANT, wanted(recipe="int8-encoder"))
    assert job.recipe["name"] == "int8-encoder"
    assert refusal(world.service, wanted(recipe="int9-encoder")).code is ErrorCode.NOT_FOUND


def test_what_is_stored_is_what_a_target_came_to(world: World):
    job, _ = world.service.submit(TENANT, wanted(recipe="auto"))
    assert job.recipe["target"] == "cpu-encoder"
    assert [options["pass"] for options in job.recipe["passes"]] == ["static-int8"]
    assert job.recipe["exports"] == ["openvino", "onnx"]


def test_what_cannot_work_is_refused_and_leaves_nothing(world: World):
    model_type = {"passes": [{"pass": "fp8"}], "exports": ["onnx"], "name": "bad"}
    cases = {
        ErrorCode.NOT_FOUND: wanted(model="nobody"),
        ErrorCode.INVALID_RECIPE: wanted(recipe=model_type),
    }
    for code, request in cases.items():
        assert refusal(world.service, request).code is code
    assert refusal(world.service, wanted(recipe={**RECIPE, "evaluate": [{"metric": "accuracy"}]})).code in {
        ErrorCode.INVALID_DATA,
        ErrorCode.INVALID_RECIPE,
    }
    assert refusal(world.service, wanted(), tenant="stranger").code is ErrorCode.NOT_FOUND
    assert world.store.reader.page(TENANT)[0] == []


def test_a_model_that_is_still_being_uploaded_is_refused(world: World):
    file = FileAnnouncement(path="model.safetensors", size=100, sha256="0" * 64)
    config = FileAnnouncement(path="config.json", size=100, sha256="1" * 64)
    tokenizer = FileAnnouncement(path="tokenizer.json", size=100, sha256="2" * 64)
    coming = world.models.create(TENANT, ModelCreate(name="coming", files=[file, config, tokenizer]))
    error = refusal(world.service, wanted(model=coming.id))
    assert error.code is ErrorCode.CONFLICT


def test_data_sets_are_pinned_when_the_job_is_submitted(world: World):
    path = world.settings.model_roots[1] / "prose.txt"
    path.write_text("It is a truth universally acknowledged.\n\n" * 20)
    first = world.data_sets.create(TENANT, DataSetCreate(name="prose", path=str(path)))
    recipe = {**RECIPE, "evaluate": [{"metric": "fidelity", "data": "prose"}]}
    job, _ = world.service.submit(TENANT, wanted(recipe=recipe))
    assert job.data == {"prose": {"id": first.id, "name": "prose", "digest": first.digest}}
    assert (
        refusal(world.service, wanted(recipe={**RECIPE, "evaluate": [{"data": "nothing"}]})).code is ErrorCode.NOT_FOUND
    )


def test_what_no_worker_of_the_queue_can_hold_is_refused(world: World):
    def announce(worker_id: str, memory: int, queue: Any = "cpu") -> None:
        world.store.roster.heartbeat_worker(Worker(worker_id, "host", queue, "cpu", memory, 2, "0.1.0"))

    announce("small", 1000)
    announce("gpu", 100 * GB, "gpu")
    on_a_cpu = wanted(recipe={**RECIPE, "device": "cpu"})
    error = refusal(world.fresh(), on_a_cpu)
    assert error.code is ErrorCode.CANNOT_FIT
    assert error.details["largest"] == 1000
    announce("large", 100 * GB)
    assert world.fresh().submit(TENANT, on_a_cpu)[1]


def test_a_repeated_request_gives_the_same_job_even_when_its_model_is_gone(world: World):
    first, _ = world.service.submit(TENANT, wanted(), "nightly")
    assert world.service.submit(TENANT, wanted(), "nightly") == (first, False)
    world.store.requests.request_cancel(TENANT, first.id)
    world.models.delete(TENANT, first.model_id)
    again, created = world.fresh().submit(TENANT, wanted(), "nightly")
    assert (again.id, created) == (first.id, False)
    assert (
        refusal(world.fresh(), wanted(name="other"), idempotency_key="nightly").code is ErrorCode.IDEMPOTENCY_MISMATCH
    )
    assert refusal(world.fresh(), wanted(), idempotency_key="fresh").code is ErrorCode.NOT_FOUND


def test_a_finished_job_can_be_retried_as_a_new_one(world: World):
    old, _ = world.service.submit(TENANT, wanted(name="nightly", priority=7, labels={"a": "b"}))
    with pytest.raises(NightpressError) as raised:
        world.service.retry(TENANT, old.id)
    assert raised.value.code is ErrorCode.CONFLICT
    lease = claim(world.store).lease
    world.store.attempts.finish(lease, succeeded(lease))
    new = world.service.retry(TENANT, old.id)
    assert new.retry_of == old.id
    kept = {"id": new.id, "created_at": new.created_at, "run_after": new.run_after, "retry_of": old.id}
    assert new == replace(old, **kept)
    finished = world.store.reader.get(TENANT, old.id)
    assert finished is not None
    assert finished.state == "succeeded"
    for tenant, job_id in ((TENANT, "job_none"), ("stranger", old.id)):
        with pytest.raises(NightpressError) as raised:
            world.service.retry(tenant, job_id)
        assert raised.value.code is ErrorCode.NOT_FOUND


def test_the_quota_of_the_settings_holds(world: World):
    service = world.fresh(max_queued_jobs=2)
    for _ in range(2):
        service.submit(TENANT, wanted())
    assert refusal(service, wanted()).code is ErrorCode.QUOTA_EXCEEDED


def announce(
    world: World, worker_id: str, queue: Any, *, memory: int = 100 * GB, gpu_memory: int | None = None, **more: Any
) -> None:
    world.store.roster.heartbeat_worker(
        Worker(worker_id, "host", queue, "a device", memory, 2, "0.1", gpu_memory=gpu_memory, **more)
    )


def unseen(world: World, worker_id: str, seconds: float) -> None:
    """Move the time at which a worker was last seen into the past."""
    with transaction(world.engine) as connection:
        moved = update(workers).where(workers.c.id == worker_id).values(last_seen_at=db_now(-seconds))
        connection.execute(moved)


def test_a_job_is_queued_where_the_fleet_can_run_it_and_says_why(world: World):
    announce(world, "only", "gpu", gpu_memory=80 * GB)
    job, _ = world.service.submit(TENANT, wanted())
    assert job.queue == "gpu"
    assert "no processor's worker has been seen lately" in job.queue_reason
    assert job.needs_gpu_memory > 0
    assert world.store.reader.get(TENANT, job.id) == job
    announce(world, "other", "cpu")
    assert world.fresh().submit(TENANT, wanted())[0].queue == "cpu"


def test_a_worker_that_said_good_bye_is_remembered_for_a_week(world: World):
    announce(world, "night", "gpu", gpu_memory=80 * GB)
    world.store.roster.remove_worker("night")
    assert world.store.roster.workers() == []
    assert world.fresh().submit(TENANT, wanted())[0].queue == "gpu"
    unseen(world, "night", 8 * 24 * 3600)
    assert world.fresh().submit(TENANT, wanted())[0].queue == "cpu"


def test_a_retry_is_queued_by_the_fleet_of_its_own_time(world: World):
    announce(world, "first", "gpu", gpu_memory=80 * GB)
    old, _ = world.service.submit(TENANT, wanted())
    world.store.requests.request_cancel(TENANT, old.id)
    unseen(world, "first", 8 * 24 * 3600)
    announce(world, "second", "cpu")
    new = world.fresh().retry(TENANT, old.id)
    assert (old.queue, new.queue) == ("gpu", "cpu")
    assert new.needs_gpu_memory == 0
    assert world.store.reader.get(TENANT, new.id) == new


def test_a_gpu_too_small_for_a_job_is_refused_where_the_recipe_insists_on_one(world: World):
    announce(world, "small", "gpu", gpu_memory=GB // 10)
    error = refusal(world.service, wanted(recipe={**RECIPE, "device": "gpu"}))
    assert error.code is ErrorCode.CANNOT_FIT
    assert "of a GPU's memory" in error.message
    assert error.details["largest"] == GB // 10


@pytest.mark.slow
def test_a_result_is_reused_wherever_it_was_made_unless_the_recipe_names_a_device(world: World):
    announce(world, "gpu", "gpu", gpu_memory=80 * GB)
    first, _ = world.service.submit(TENANT, wanted())
    claimed = world.store.claims.claim(host(), ttl_s=60)
    assert claimed is not None
    world.store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    announce(world, "cpu", "cpu")
    again, _ = world.fresh().submit(TENANT, wanted(reuse=True))
    assert (first.queue, again.queue, again.reused_from) == ("gpu", "cpu", first.id)
    elsewhere, _ = world.fresh().submit(TENANT, wanted(reuse=True, recipe={**RECIPE, "device": "cpu"}))
    assert (elsewhere.state, elsewhere.reused_from) == ("queued", None)
    same, _ = world.fresh().submit(TENANT, wanted(reuse=True, recipe={**RECIPE, "device": "gpu"}))
    assert same.reused_from == first.id


def test_a_queued_job_says_that_no_worker_has_been_there_for_an_hour(world: World):
    job, _ = world.service.submit(TENANT, wanted())
    assert world.store.roster.fleet().notice(job) is None, "it has only just come"
    announce(world, "gone", "cpu")
    unseen(world, "gone", 3700)
    notice = world.store.roster.fleet().notice(job)
    assert notice is not None
    assert "No cpu worker has been seen for 1 h" in notice
    assert "NIGHTPRESS_WORKER_QUEUE=cpu" in notice
    announce(world, "small", "cpu", memory=1000)
    notice = world.store.roster.fleet().notice(job)
    assert notice is not None
    assert "No cpu worker that could hold it" in notice
    announce(world, "gone", "cpu")
    assert world.store.roster.fleet().notice(job) is None


def test_a_job_that_wants_more_gpus_than_any_host_has_waits_and_says_so(world: World):
    announce(world, "one", "gpu", gpu_memory=80 * GB)  # as workers of earlier versions say it
    announce(world, "four", "gpu", gpu_memory=80 * GB, gpu_kinds=[[24 * GB, 1], [80 * GB, 4]])
    job, _ = world.service.submit(TENANT, wanted(recipe={**RECIPE, "gpus": 8}))
    assert (job.queue, job.gpus, job.state) == ("gpu", 8, "queued")
    assert "the largest host seen lately has 4, so it waits for a larger one" in job.queue_reason
    assert job.gpu_bytes < 80 * GB < job.needs_gpu_memory, "a worker of an earlier version sees no GPU as large as that"
    age(world.engine, job.id, 3700, "created_at", "run_after")
    waiting = world.store.reader.get(TENANT, job.id)
    assert waiting is not None
    notice = str(world.store.roster.fleet().notice(waiting))
    assert "No gpu worker with 8 GPUs (the largest has 4) has been seen lately." in notice
    announce(world, "eight", "gpu", gpu_memory=80 * GB, gpu_kinds=[[80 * GB, 8]])
    assert world.store.roster.fleet().notice(waiting) is None
    fits, _ = world.fresh().submit(TENANT, wanted(recipe={**RECIPE, "gpus": 4}))
    assert fits.queue_reason == "the recipe asks for several GPUs. `gpus: 4`, as the recipe says."


def test_workers_that_run_cpu_jobs_beside_serve_the_queue_cpu_too(world: World):
    announce(world, "host", "gpu", gpu_memory=80 * GB, gpu_kinds=[[80 * GB, 8]], cpu_jobs=2)
    assert world.fresh().submit(TENANT, wanted())[0].queue == "cpu"


def test_a_result_is_reused_by_the_number_of_gpus_that_the_recipe_names(world: World):
    announce(world, "gpus", "gpu", gpu_memory=80 * GB, gpu_kinds=[[80 * GB, 8]])
    first, _ = world.service.submit(TENANT, wanted(recipe={**RECIPE, "gpus": 2}))
    claimed = world.store.claims.claim(host(), ttl_s=60)
    assert claimed is not None
    world.store.attempts.finish(claimed.lease, succeeded(claimed.lease))
    asked = {count: wanted(reuse=True, recipe={**RECIPE, "gpus": count}) for count in (2, 3, "auto")}
    found = {count: world.fresh().submit(TENANT, job)[0].reused_from for count, job in asked.items()}
    assert found == {2: first.id, 3: None, "auto": first.id}


def test_a_job_older_than_an_hour_says_that_no_worker_ever_came(world: World):
    job, _ = world.service.submit(TENANT, wanted())
    age(world.engine, job.id, 3700, "created_at", "run_after")
    waiting = world.store.reader.get(TENANT, job.id)
    assert waiting is not None
    assert "No cpu worker has been seen lately" in str(world.store.roster.fleet().notice(waiting))


def test_force_lets_the_source_be_measured_again(world: World):
    digest = str(world.models.get(TENANT, "tiny").digest)
    for tenant in (TENANT, "stranger"):
        world.store.sources.put(tenant, KeptSource("job_1", "a" * 64, 1), tenant_id=tenant, model_digest=digest)
    world.service.submit(TENANT, wanted(reuse=True))
    assert world.store.sources.take(TENANT) is not None
    world.service.submit(TENANT, wanted(force=True))
    assert world.store.sources.take(TENANT) is None
    assert world.store.sources.take("stranger") is not None
    world.store.sources.put(TENANT, KeptSource("job_2", "a" * 64, 1), tenant_id=TENANT, model_digest=digest)
    world.service.submit_all(TENANT, [wanted(), wanted(force=True)])
    assert world.store.sources.take(TENANT) is None
