"""From what a person asks for to a job that can run: names become identifiers, the recipe becomes a plan, and what can't work is refused."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from core.access.quotas import NO_BOUND, QuotaBook
from core.errors import ErrorCode, NightpressError
from core.jobs.records import Idempotency, Job, NewJob, Queue, Worker
from core.jobs.states import is_terminal
from core.jobs.store import JobStore
from core.recipes.builtins import get_recipe
from core.recipes.header import ModelHeader
from core.recipes.models import Quality, Recipe, parse_recipe
from core.recipes.plan import Leaner, Plan, make_plan
from core.schemas import DataSetView, JobCreate, JobSpec, ModelView
from core.settings import Settings
from core.tracing import span, traceparent
from core.version import ENGINE

Value = TypeVar("Value")


class Models(Protocol):
    """What the service asks of the registry of models."""

    def get(self, tenant_id: str, id_or_name: str) -> ModelView: ...

    def header(self, model_id: str) -> ModelHeader: ...


class DataSets(Protocol):
    """What the service asks of the registry of data sets."""

    def get(self, tenant_id: str, id_or_name: str) -> DataSetView: ...


class _Briefly(Generic[Value]):
    """Answers remembered for a few seconds, so that a burst of submissions asks SQL once. Errors are not remembered."""

    def __init__(self, seconds: float, size: int = 256) -> None:
        self._seconds = seconds
        self._size = size
        self._lock = threading.Lock()
        self._kept: dict[Hashable, tuple[Value, float]] = {}

    def get(self, key: Hashable, ask: Callable[[], Value]) -> Value:
        found = self._kept.get(key)
        if found is not None and time.monotonic() < found[1]:
            return found[0]
        value = ask()
        with self._lock:
            if len(self._kept) >= self._size:
                self._kept.clear()
            self._kept[key] = (value, time.monotonic() + self._seconds)
        return value


class JobService:
    """Submits and retries jobs. Safe to share between threads."""

    def __init__(
        self, store: JobStore, models: Models, data_sets: DataSets, quotas: QuotaBook, settings: Settings
    ) -> None:
        self._store = store
        self._models = models
        self._data_sets = data_sets
        self._quotas = quotas
        self._settings = settings
        self._planned: _Briefly[_Planned] = _Briefly(3.0)
        self._workers: _Briefly[list[Worker]] = _Briefly(3.0, size=1)

    def submit(
        self, tenant_id: str, wanted: JobCreate, idempotency_key: str | None = None, *, key_id: str | None = None
    ) -> tuple[Job, bool]:
        """Write a job, in the name of an API key. Returns it, and False where the idempotency key had made it before.

        Raises NightpressError: not_found, conflict (the model isn't ready), invalid_recipe, unsupported_architecture,
        invalid_data, cannot_fit, quota_exceeded, idempotency_mismatch.
        """
        idempotency = None
        if idempotency_key is not None:
            body = wanted.model_copy(update={"reuse": bool(wanted.reuse)}).model_dump_json()
            idempotency = Idempotency(idempotency_key, hashlib.sha256(body.encode()).hexdigest())
        try:
            new = self._resolve(tenant_id, wanted, key_id)
        except NightpressError:
            # What made the job may be gone by now; the job itself is not.
            job = self._store.replay(tenant_id, idempotency) if idempotency else None
            if job is None:
                raise
            return job, False
        job, created = self._admit(new, idempotency)
        if created and wanted.reuse and not wanted.force:
            job = self._store.reuse(job)
        return job, created

    def submit_all(self, tenant_id: str, wanted: Sequence[JobCreate], *, key_id: str | None = None) -> list[Job]:
        """Write jobs, all or none. Raises what `submit` would, with each job's fault by its place in `faults`."""
        news: list[NewJob] = []
        refusals: list[tuple[int, NightpressError]] = []
        for index, one in enumerate(wanted):
            try:
                news.append(self._resolve(tenant_id, one, key_id))
            except NightpressError as error:
                if error.kind.retryable:
                    raise
                refusals.append((index, error))
        if refusals:
            (index, first), count = refusals[0], len(refusals)
            faults = [
                {"at": f"body.jobs.{at}", "problem": str(error), "type": error.code.value} for at, error in refusals
            ]
            raise NightpressError(
                first.code,
                f"No job was submitted: {count} of {len(wanted)} can't be. Number {index}: {first.message}",
                hint=first.hint,
                faults=faults,
            )
        quotas = self._quotas.of(tenant_id)
        self._quotas.check_storage(tenant_id)
        if any(new.queue == "gpu" for new in news):
            self._quotas.check_gpu(tenant_id)
        made = self._store.submit_all(news, max_queued=quotas.max_queued_jobs or NO_BOUND)
        return [
            self._store.reuse(job) if one.reuse and not one.force else job
            for job, one in zip(made, wanted, strict=True)
        ]

    def check(self, tenant_id: str, wanted: JobSpec) -> None:
        """Raise what submitting this job now would raise, the quota apart."""
        found = self._look_up(tenant_id, wanted)
        self._check_fit(found.queue, found.needs_memory, found.leaner)

    def fingerprint(self, tenant_id: str, wanted: JobSpec) -> str:
        """Of all that would decide the result of this job if it was submitted now. Raises what `check` raises, but cannot_fit."""
        return self._look_up(tenant_id, wanted).fingerprint

    def retry(self, tenant_id: str, job_id: str, *, key_id: str | None = None) -> Job:
        """Run a finished job again, as a new job with `retry_of`: the same model, recipe, data and limits.

        Raises NightpressError: not_found, conflict (it hasn't ended), quota_exceeded.
        """
        old = self._store.get(tenant_id, job_id)
        if old is None:
            raise NightpressError(ErrorCode.NOT_FOUND, "There is no such job.", hint="GET /v1/jobs lists yours.")
        if not is_terminal(old.state):
            raise NightpressError(
                ErrorCode.CONFLICT,
                f"The job is {old.state}; only one that has ended can be retried.",
                hint="Wait for it, or cancel it first.",
                state=old.state,
            )
        self._ready_model(tenant_id, old.model_id)
        for data_set in old.data.values():
            self._ready_data(tenant_id, data_set["id"])
        self._check_fit(old.queue, old.needs_memory)
        new = NewJob(
            tenant_id=tenant_id,
            name=old.name,
            priority=old.priority,
            labels=old.labels,
            queue=old.queue,
            needs_memory=old.needs_memory,
            model_id=old.model_id,
            model_name=old.model_name,
            model_digest=old.model_digest,
            recipe=old.recipe,
            data=old.data,
            queue_limit_s=old.queue_limit_s,
            run_limit_s=old.run_limit_s,
            stall_s=old.stall_s,
            max_failures=old.max_failures,
            retry_of=old.id,
            promote=old.promote,
            created_by=key_id,
            fingerprint=_fingerprint(old.model_digest, old.recipe, old.data, old.queue),
        )
        return self._admit(new)[0]

    def _admit(self, new: NewJob, idempotency: Idempotency | None = None) -> tuple[Job, bool]:
        quotas = self._quotas.of(new.tenant_id)
        self._quotas.check_storage(new.tenant_id)
        if new.queue == "gpu":
            self._quotas.check_gpu(new.tenant_id)
        with span("submit", {"nightpress.tenant": new.tenant_id, "nightpress.queue": new.queue}) as here:
            traced = replace(new, traceparent=traceparent())
            job, created = self._store.submit(
                traced, idempotency=idempotency, max_queued=quotas.max_queued_jobs or NO_BOUND
            )
            here.set_attributes({"nightpress.job_id": job.id})
        return job, created

    def _resolve(self, tenant_id: str, wanted: JobCreate, key_id: str | None) -> NewJob:
        found = self._look_up(tenant_id, wanted)
        self._check_fit(found.queue, found.needs_memory, found.leaner)
        settings = self._settings
        return NewJob(
            tenant_id=tenant_id,
            name=wanted.name,
            priority=wanted.priority,
            labels=wanted.labels,
            queue=found.queue,
            needs_memory=found.needs_memory,
            model_id=found.model_id,
            model_name=found.model_name,
            model_digest=found.model_digest,
            recipe=found.recipe,
            data=found.data,
            fingerprint=found.fingerprint,
            run_after=wanted.run_after,
            queue_limit_s=wanted.queue_limit_s,
            run_limit_s=wanted.run_limit_s or settings.run_limit_s,
            stall_s=settings.stall_s,
            max_failures=wanted.max_failures or settings.max_failures,
            promote=wanted.promote,
            created_by=key_id,
        )

    def _look_up(self, tenant_id: str, wanted: JobSpec) -> "_Resolved":
        """What the names mean now. They are asked for each time: a name means other weights as soon as these are registered."""
        recipe = get_recipe(wanted.recipe) if isinstance(wanted.recipe, str) else parse_recipe(wanted.recipe)
        model = self._ready_model(tenant_id, wanted.model)
        planned = self._planned.get((model.id, recipe.model_dump_json()), lambda: self._make_plan(model.id, recipe))
        plan, recipe = planned.plan, planned.plan.recipe  # with its target decided for this model
        data = {name: self._ready_data(tenant_id, name) for name in sorted(recipe.data_refs())}
        _check_labels(recipe, planned.header, data)
        return _Resolved(
            model_id=model.id,
            model_name=model.name,
            model_digest=str(model.digest),
            queue=plan.queue,
            needs_memory=plan.estimate.memory_bytes if plan.estimate else 0,
            leaner=plan.estimate.leaner if plan.estimate else (),
            recipe=recipe.model_dump(mode="json"),
            data={name: {"id": one.id, "name": one.name, "digest": one.digest} for name, one in data.items()},
        )

    def _make_plan(self, model_id: str, recipe: Recipe) -> "_Planned":
        header = self._models.header(model_id)
        return _Planned(header, make_plan(recipe, header))

    def _ready_model(self, tenant_id: str, id_or_name: str) -> ModelView:
        model = self._models.get(tenant_id, id_or_name)
        _must_be_ready("model", model)
        return model

    def _ready_data(self, tenant_id: str, id_or_name: str) -> DataSetView:
        data_set = self._data_sets.get(tenant_id, id_or_name)
        _must_be_ready("data set", data_set)
        return data_set

    def _check_fit(self, queue: Queue, needs_memory: int, leaner: Sequence[Leaner] = ()) -> None:
        """Refuse what no worker could ever hold. Where none is there to compare with, one that is large enough may still come."""
        workers = self._workers.get("workers", self._store.workers)
        offers = [one.memory for one in workers if one.queue == queue and one.state != "lost"]
        if offers and max(offers) < needs_memory:
            fitting = next((one for one in leaner if one.memory_bytes <= max(offers)), None)
            advice = "Start a" if fitting is None else f"Give the recipe {fitting.change}, or start a"
            raise NightpressError(
                ErrorCode.CANNOT_FIT,
                f"The job needs about {needs_memory / 1e9:.1f} GB of memory; the largest {queue} worker offers {max(offers) / 1e9:.1f} GB.",
                hint=f"{advice} worker that offers {-(-needs_memory // 2**30)} GiB, or raise NIGHTPRESS_WORKER_MEMORY if one has more than it offers.",
                needs=needs_memory,
                largest=max(offers),
            )


def _must_be_ready(noun: str, one: ModelView | DataSetView) -> None:
    says = {
        "uploading": ("still being uploaded", "Complete its upload first."),
        "fetching": ("still being fetched", "Wait until it is ready."),
        "verifying": ("still being verified", "Wait until it is ready."),
        "failed": ("not usable", "Its `error` says why. Register it again."),
    }
    if one.state != "ready":
        state, hint = says[one.state]
        raise NightpressError(ErrorCode.CONFLICT, f"The {noun} {one.name} is {state}.", hint=hint, state=one.state)


@dataclass(frozen=True)
class _Planned:
    """What a recipe comes to on a model. Neither changes: only a name's meaning does."""

    header: ModelHeader
    plan: Plan


@dataclass(frozen=True)
class _Resolved:
    """What a model's, a recipe's and the data sets' names mean."""

    model_id: str
    model_name: str
    model_digest: str
    queue: Queue
    needs_memory: int
    leaner: tuple[Leaner, ...]
    recipe: dict[str, Any]
    data: dict[str, dict[str, Any]]

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.model_digest, self.recipe, self.data, self.queue)


def _fingerprint(model_digest: str, recipe: dict[str, Any], data: dict[str, dict[str, Any]], queue: Queue) -> str:
    """Of all that decides a job's result. What a recipe is called decides nothing."""
    says = {key: value for key, value in recipe.items() if key not in {"name", "version", "description"}}
    digests = {name: one["digest"] for name, one in data.items()}
    body = {"model": model_digest, "recipe": says, "data": digests, "queue": queue, "engine": ENGINE}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_labels(recipe: Recipe, header: ModelHeader, data: dict[str, DataSetView]) -> None:
    for one in recipe.evaluate:
        if isinstance(one, Quality) and one.metric == "accuracy" and not (one.data in data and data[one.data].labelled):
            raise NightpressError(
                ErrorCode.INVALID_DATA,
                f"evaluate: accuracy needs labels, and {one.data} has none.",
                hint="Name a data set of rows with `text` and `label`.",
            )
    for step in recipe.passes:
        for ref in step.data_refs() if step.wants_labels(header) else ():
            if not (ref in data and data[ref].labelled):
                raise NightpressError(
                    ErrorCode.INVALID_DATA,
                    f"`{step.name}` learns from labels, and {ref} has none.",
                    hint="Name a data set of rows with `text` and `label`.",
                )
