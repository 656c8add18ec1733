"""Turns a request into a job that can run: resolves names to identifiers, plans the recipe, and refuses jobs that can't work."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Quality, Recipe, parse_recipe
from nightpress.core.recipes.passes.catalog import packages_of
from nightpress.core.recipes.plan import Plan, make_plan
from nightpress.core.service.access.quotas import NO_BOUND, QuotaBook
from nightpress.core.service.deliveries.addresses import check_destinations
from nightpress.core.service.jobs.fit import check_fit
from nightpress.core.service.jobs.records import NOT_FOR_OLD_WORKERS, Idempotency, Job, NewJob
from nightpress.core.service.jobs.roster import Fleet
from nightpress.core.service.jobs.states import is_terminal
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.settings import Settings
from nightpress.core.tracing import span, traceparent
from nightpress.core.version import ENGINE, engine_with
from nightpress.core.wire.jobs import JobCreate, JobRequest
from nightpress.core.wire.models import DataSetView, ModelView

Value = TypeVar("Value")


class ModelLookup(Protocol):
    """The part of the registry of models that this service uses."""

    def get(self, tenant_id: str, id_or_name: str) -> ModelView: ...

    def header(self, model_id: str) -> ModelHeader: ...


class DataSetLookup(Protocol):
    """The part of the registry of data sets that this service uses."""

    def get(self, tenant_id: str, id_or_name: str) -> DataSetView: ...


class _RecentAnswers(Generic[Value]):
    """Caches answers for a few seconds, so that a burst of submissions queries SQL once. Errors are not cached."""

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
        self, store: JobStore, models: ModelLookup, data_sets: DataSetLookup, quotas: QuotaBook, settings: Settings
    ) -> None:
        self._store = store
        self._models = models
        self._data_sets = data_sets
        self._quotas = quotas
        self._settings = settings
        self._planned: _RecentAnswers[_Planned] = _RecentAnswers(3.0)
        self._fleet: _RecentAnswers[Fleet] = _RecentAnswers(3.0, size=1)

    def submit(
        self, tenant_id: str, wanted: JobCreate, idempotency_key: str | None = None, *, key_id: str | None = None
    ) -> tuple[Job, bool]:
        """Submit a job for the API key `key_id`. Returns the job, and False if a request with the same idempotency key made it before.

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
            # The model or recipe may be deleted since, but the job of the first request still exists.
            job = self._store.submission.replay(tenant_id, idempotency) if idempotency else None
            if job is None:
                raise
            return job, False
        if wanted.force:
            self._measure_anew([new])
        job, created = self._admit(new, idempotency)
        if created and wanted.reuse and not wanted.force:
            job = self._store.requests.reuse(job)
        return job, created

    def prepare(self, tenant_id: str, wanted: JobCreate, *, key_id: str | None = None) -> tuple[NewJob, int]:
        """A job that the caller inserts in its own transaction, and the most jobs that the tenant may have queued.

        Raises what `submit` raises.
        """
        new = self._resolve(tenant_id, wanted, key_id)
        return new, self._max_queued(new)

    def submit_all(self, tenant_id: str, wanted: Sequence[JobCreate], *, key_id: str | None = None) -> list[Job]:
        """Submit all jobs or none. Raises what `submit` raises; `faults` in its details lists the fault of each job by its index."""
        news: list[NewJob] = []
        refusals: list[tuple[int, NightpressError]] = []
        for index, request in enumerate(wanted):
            try:
                news.append(self._resolve(tenant_id, request, key_id))
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
        self._quotas.check_budget(tenant_id)
        if any(new.queue == "gpu" for new in news):
            self._quotas.check_gpu(tenant_id)
        self._measure_anew(new for new, request in zip(news, wanted, strict=True) if request.force)
        made = self._store.submission.submit_all(news, max_queued=quotas.max_queued_jobs or NO_BOUND)
        return [
            self._store.requests.reuse(job) if request.reuse and not request.force else job
            for job, request in zip(made, wanted, strict=True)
        ]

    def check(self, tenant_id: str, wanted: JobRequest) -> None:
        """Raise what submitting this job now would raise, except for quotas."""
        check_fit(self._look_up(tenant_id, wanted).plan, self.fleet().seats)

    def plan(self, recipe: Recipe, model_id: str) -> Plan:
        """The plan of a recipe for a model: what it would do, and on which queue, given the workers seen lately."""
        return make_plan(recipe, self._models.header(model_id), self.fleet().seats)

    def fleet(self) -> Fleet:
        """The workers seen lately. The answer may be a few seconds old."""
        return self._fleet.get("fleet", self._store.roster.fleet)

    def fingerprint(self, tenant_id: str, wanted: JobRequest) -> str:
        """The fingerprint that this job would have if it was submitted now. Raises what `check` raises, except cannot_fit."""
        return self._look_up(tenant_id, wanted).fingerprint

    def retry(self, tenant_id: str, job_id: str, *, key_id: str | None = None) -> Job:
        """Run a finished job again, as a new job with `retry_of`: the same model, recipe, data and limits, but with a new plan.

        Raises NightpressError: not_found, conflict (it hasn't ended), quota_exceeded.
        """
        old = self._store.reader.get(tenant_id, job_id)
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
        plan = self.plan(parse_recipe(old.recipe), old.model_id)
        check_fit(plan, self.fleet().seats)
        new = NewJob(
            tenant_id=tenant_id,
            name=old.name,
            priority=old.priority,
            labels=old.labels,
            **_planned(plan),
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
            destinations=old.destinations,
            created_by=key_id,
            fingerprint=_fingerprint(old.model_digest, old.recipe, old.data),
        )
        return self._admit(new)[0]

    def _measure_anew(self, news: Iterable[NewJob]) -> None:
        """Let the next job on each model measure its source, whatever is kept of it. Before the jobs are written: they may start at once."""
        for new in news:
            self._store.sources.outdate(new.tenant_id, new.model_digest)

    def _max_queued(self, new: NewJob) -> int:
        """The most jobs that the tenant may have queued. Raises quota_exceeded if the storage, the GPU time or the budget is used up."""
        self._quotas.check_storage(new.tenant_id)
        self._quotas.check_budget(new.tenant_id)
        if new.queue == "gpu":
            self._quotas.check_gpu(new.tenant_id)
        return self._quotas.of(new.tenant_id).max_queued_jobs or NO_BOUND

    def _admit(self, new: NewJob, idempotency: Idempotency | None = None) -> tuple[Job, bool]:
        max_queued = self._max_queued(new)
        with span("submit", {"nightpress.tenant": new.tenant_id, "nightpress.queue": new.queue}) as here:
            traced = replace(new, traceparent=traceparent())
            job, created = self._store.submission.submit(traced, idempotency=idempotency, max_queued=max_queued)
            here.set_attributes({"nightpress.job_id": job.id})
        return job, created

    def _resolve(self, tenant_id: str, wanted: JobCreate, key_id: str | None) -> NewJob:
        found = self._look_up(tenant_id, wanted)
        check_fit(found.plan, self.fleet().seats)
        settings = self._settings
        return NewJob(
            tenant_id=tenant_id,
            name=wanted.name,
            priority=wanted.priority,
            labels=wanted.labels,
            **_planned(found.plan),
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
            destinations=wanted.destinations,
            created_by=key_id,
        )

    def _look_up(self, tenant_id: str, wanted: JobRequest) -> "_Resolved":
        """Resolve the names of model and data sets. Names are not cached: a name means other weights as soon as these are registered."""
        recipe = get_recipe(wanted.recipe) if isinstance(wanted.recipe, str) else parse_recipe(wanted.recipe)
        model = self._ready_model(tenant_id, wanted.model)
        planned = self._planned.get((model.id, recipe.model_dump_json()), lambda: self._make_plan(model.id, recipe))
        plan, recipe = planned.plan, planned.plan.recipe  # this recipe has its target chosen for this model
        data = {name: self._ready_data(tenant_id, name) for name in sorted(recipe.data_refs())}
        _check_labels(recipe, planned.header, data)
        exports = max(1, len(recipe.exports))
        check_destinations(wanted.destinations, self._settings, model=model.name, exports=exports)
        return _Resolved(
            model_id=model.id,
            model_name=model.name,
            model_digest=str(model.digest),
            plan=plan,
            recipe=recipe.model_dump(mode="json"),
            data={
                name: {"id": data_set.id, "name": data_set.name, "digest": data_set.digest}
                for name, data_set in data.items()
            },
        )

    def _make_plan(self, model_id: str, recipe: Recipe) -> "_Planned":
        header = self._models.header(model_id)
        return _Planned(header, make_plan(recipe, header, self.fleet().seats))

    def _ready_model(self, tenant_id: str, id_or_name: str) -> ModelView:
        model = self._models.get(tenant_id, id_or_name)
        _must_be_ready("model", model)
        return model

    def _ready_data(self, tenant_id: str, id_or_name: str) -> DataSetView:
        data_set = self._data_sets.get(tenant_id, id_or_name)
        _must_be_ready("data set", data_set)
        return data_set


def _must_be_ready(noun: str, model: ModelView | DataSetView) -> None:
    says = {
        "uploading": ("still being uploaded", "Complete its upload first."),
        "fetching": ("still being fetched", "Wait until it is ready."),
        "verifying": ("still being verified", "Wait until it is ready."),
        "failed": ("not usable", "Its `error` says why. Register it again."),
    }
    if model.state != "ready":
        state, hint = says[model.state]
        raise NightpressError(ErrorCode.CONFLICT, f"The {noun} {model.name} is {state}.", hint=hint, state=model.state)


@dataclass(frozen=True)
class _Planned:
    """The plan of a recipe for a model and the workers seen lately."""

    header: ModelHeader
    plan: Plan


@dataclass(frozen=True)
class _Resolved:
    """The model, plan, recipe and data sets that the names of a request refer to."""

    model_id: str
    model_name: str
    model_digest: str
    plan: Plan
    recipe: dict[str, Any]
    data: dict[str, dict[str, Any]]

    @property
    def fingerprint(self) -> str:
        return _fingerprint(self.model_digest, self.recipe, self.data)


def _planned(plan: Plan) -> dict[str, Any]:
    """The columns of a job that its plan decides."""
    assert plan.estimate is not None
    new_field = plan.queue == "gpu" and plan.recipe.gpus != 1  # a worker from before recipes had `gpus` can't read it
    return {
        "queue": plan.queue,
        "queue_reason": " ".join(filter(None, (plan.queue_reason, plan.gpus_reason))),
        "needs_memory": plan.estimate.memory_bytes,
        "needs_gpu_memory": plan.estimate.gpu_bytes + (NOT_FOR_OLD_WORKERS if new_field else 0),
        "needs_gpus": max(1, plan.gpus),
    }


def _fingerprint(model_digest: str, recipe: dict[str, Any], data: dict[str, dict[str, Any]]) -> str:
    """A SHA-256 of everything that decides a job's result.

    It leaves out the device and the GPUs, which `JobRequests.reuse` compares, and the recipe's name, version and description.
    """
    elsewhere = {"name", "version", "description", "device", "gpus"}
    says = {key: value for key, value in recipe.items() if key not in elsewhere}
    digests = {name: entry["digest"] for name, entry in data.items()}
    engine = engine_with(ENGINE, packages_of(recipe))
    body = {"model": model_digest, "recipe": says, "data": digests, "engine": engine}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_labels(recipe: Recipe, header: ModelHeader, data: dict[str, DataSetView]) -> None:
    for measure in recipe.evaluate:
        if (
            isinstance(measure, Quality)
            and measure.metric == "accuracy"
            and not (measure.data in data and data[measure.data].labelled)
        ):
            raise NightpressError(
                ErrorCode.INVALID_DATA,
                f"evaluate: accuracy needs labels, and {measure.data} has none.",
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
