"""The operations on studies that the API offers: create and cancel. Also makes the recipes of trials."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.models import Quality, Recipe, parse_recipe
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.search.auto import MEASURES, Goal, auto_space, auto_starts
from nightpress.core.recipes.search.space import Params, Space
from nightpress.core.service.jobs.service import JobService
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.studies.front import front_of
from nightpress.core.service.studies.ledger import StudyLedger
from nightpress.core.service.studies.store import StudyStore
from nightpress.core.version import ENGINE
from nightpress.core.wire.jobs import JobRequest
from nightpress.core.wire.studies import Role, StudyRequest, StudyView

_MOST_PARALLEL = 64
#: A gate on the size is surely missed where the estimate is this much above its bound. Estimates were within a few percent of the files.
_SIZE_SLACK = 1.15
_OWN = ("evaluate", "gates", "screen")
#: A gate's figure → the metric that measures it, where `auto` may choose another.
_METRICS: Mapping[str, str] = {
    **dict.fromkeys(("spearman", "pearson"), "similarity"),
    **dict.fromkeys(("ndcg", "recall"), "retrieval"),
    "neighbour_recall": "neighbours",
    **dict.fromkeys(("mrr", "kendall_tau"), "ranking"),
    **dict.fromkeys(("generation_match", "prefix_match"), "generation"),
    **dict.fromkeys(("accuracy", "f1"), "accuracy"),
    **dict.fromkeys(("perplexity", "bits_per_byte"), "perplexity"),
    "choice_accuracy": "multiple-choice",
    "entity_f1": "entities",
    "masked_accuracy": "masked-lm",
}
#: What is timed → the gates' figures that need it.
_TIMED: Mapping[Goal, frozenset[str]] = {
    "latency": frozenset({"latency", "throughput"}),
    "decode": frozenset({"decode_tokens_per_s", "prefill_tokens_per_s"}),
}


class StudyService:
    """Checks requests, and writes through the store. Safe to share between threads."""

    def __init__(
        self, store: StudyStore, ledger: StudyLedger, jobs: JobService, runs: JobStore, models: ModelRegistry
    ) -> None:
        self.store = store
        self._ledger = ledger
        self._jobs = jobs
        self._runs = runs
        self._models = models

    def create(
        self, tenant_id: str, wanted: StudyRequest, *, key_id: str | None = None, study_id: str | None = None
    ) -> StudyView:
        """Begin a study. study_id: a study that exists under this id is returned.

        Raises invalid_recipe, not_found, conflict (the model isn't ready), quota_exceeded and what submitting a trial raises.
        """
        values = self._resolved(tenant_id, wanted) | {"created_by": key_id}
        return self.store.create(tenant_id, values, hours=wanted.hours, study_id=study_id)

    def check(self, tenant_id: str, wanted: StudyRequest) -> None:
        """Raise what `create` would raise now, except for quotas."""
        self._resolved(tenant_id, wanted)

    def fingerprint(self, tenant_id: str, wanted: StudyRequest) -> str:
        """A digest of what decides a study's result: the model's bytes, what is wanted, and the engine. Raises not_found."""
        says = wanted.model_dump(mode="json", exclude={"model", "start_from", "name", "labels", "priority"})
        digest = str(self._models.get(tenant_id, wanted.model).digest)
        return hashlib.sha256(json.dumps([digest, says, ENGINE], sort_keys=True).encode()).hexdigest()

    def _resolved(self, tenant_id: str, wanted: StudyRequest) -> dict[str, Any]:
        """The columns of a study's row that the request decides."""
        model = self._models.get(tenant_id, wanted.model)
        if model.state != "ready":
            raise NightpressError(
                ErrorCode.CONFLICT, f"The model {model.name} is {model.state}.", hint="Wait until it is ready."
            )
        header = self._models.header(model.id)
        fleet = self._jobs.fleet()
        if wanted.space == "auto":
            space = auto_space(header, wanted.target, wanted.minimize, fleet.seats)
            starts: list[Params] = [*auto_starts(space)]
        else:
            space = _own_space(wanted)
            starts = [*space.starts()]
        parts = {
            "recipes": list(space.recipes),
            "evaluate": _evaluations(wanted),
            "screen": wanted.screen,
            **({} if wanted.calibration is None else {"calibration": wanted.calibration}),
        }
        first = self._first_valid(tenant_id, model.id, header, space, parts, wanted.gates)
        starts = [*self._earlier(tenant_id, wanted.start_from, parts), first, *starts]
        return {
            "name": wanted.name,
            "model_id": model.id,
            "model_name": model.name,
            "model_digest": str(model.digest),
            "minimize": wanted.minimize,
            "gates": wanted.gates,
            "target": wanted.target,
            "space": parts,
            "automatic": wanted.space == "auto",
            "starts": [point for at, point in enumerate(starts) if point not in starts[:at]],
            "seed": wanted.seed,
            "parallel": wanted.parallel or self._workers(),
            "max_trials": wanted.trials,
            "max_judged": wanted.judge,
            "cpu_limit_s": None if wanted.cpu_hours is None else 3600 * wanted.cpu_hours,
            "gpu_limit_s": None if wanted.gpu_hours is None else 3600 * wanted.gpu_hours,
            "cost_limit": self._cost_limit(wanted),
            "priority": wanted.priority,
            "labels": wanted.labels,
            "promote": wanted.promote,
        }

    def _cost_limit(self, wanted: StudyRequest) -> float | None:
        if wanted.max_cost is not None and not self._ledger.prices:
            raise NightpressError(
                ErrorCode.INVALID_REQUEST,
                "max_cost: the operator has set no prices, so nothing costs anything here.",
                hint="Leave it out, and give `cpu_hours` or `gpu_hours`.",
            )
        return wanted.max_cost

    def cancel(self, tenant_id: str, study_id: str) -> StudyView:
        """Cancel a study and its trials. The control process ends it when no trial runs any more. Raises not_found."""
        for job_id in self.store.request_cancel(tenant_id, study_id):
            self._runs.requests.request_cancel(tenant_id, job_id)
        return self.store.get(tenant_id, study_id)

    def _workers(self) -> int:
        """The number of workers that could take a trial now, at least 1."""
        alive = [worker for worker in self._runs.roster.workers() if worker.state in {"idle", "busy"}]
        return max(1, min(_MOST_PARALLEL, len(alive)))

    def _first_valid(
        self,
        tenant_id: str,
        model_id: str,
        header: ModelHeader,
        space: Space,
        parts: Mapping[str, Any],
        gates: Mapping[str, str],
    ) -> Params:
        """The first start that can work. Raises the error of the first start if none can."""
        refused: list[NightpressError] = []
        for point in space.starts():
            try:
                recipe = trial_recipe(parts, space.at(point), gates, "search")
                make_plan(recipe, header)
                self._jobs.check(tenant_id, JobRequest(model=model_id, recipe=recipe.model_dump(mode="json")))
                return point
            except NightpressError as error:
                refused.append(error)
        raise refused[0]

    def _earlier(self, tenant_id: str, study_id: str | None, parts: Mapping[str, Any]) -> list[Params]:
        """The front of an earlier study of the same space; nothing if the space is another."""
        if study_id is None:
            return []
        earlier = self.store.get(tenant_id, study_id)
        if earlier.space != parts["recipes"]:
            return []
        return [trial.params for trial in front_of(self._ledger.trials(study_id))]


def _own_space(wanted: StudyRequest) -> Space:
    assert not isinstance(wanted.space, str)
    for at, recipe in enumerate(wanted.space):
        if found := [key for key in _OWN if key in recipe]:
            raise invalid(
                f"space.{at}: it names {', '.join(found)}, which are the study's own.", "Leave them out of the space."
            )
    target = {} if wanted.target is None else {"target": wanted.target}
    return Space([{"name": f"recipe-{at}", **target, **recipe} for at, recipe in enumerate(wanted.space)])


def _evaluations(wanted: StudyRequest) -> list[dict[str, Any]]:
    if wanted.evaluate is not None:
        return wanted.evaluate
    figures = [gate.split("[")[0] for gate in wanted.gates]  # without their slices
    metrics = list(dict.fromkeys(_METRICS[figure] for figure in figures if figure in _METRICS)) or ["auto"]
    if "ranking" in metrics and "retrieval" in metrics:  # rerankers have nDCG, too
        metrics.remove("retrieval")
    data = {"data": wanted.data, "samples": wanted.samples, "length": wanted.length}
    timed = {goal for goal, figures in _TIMED.items() if goal == wanted.minimize or figures & wanted.gates.keys()}
    return [
        *({"metric": metric, **data} for metric in metrics),
        *(dict(entry) for goal in _TIMED if goal in timed for entry in MEASURES[goal]),
    ]


def trial_recipe(parts: Mapping[str, Any], point: Mapping[str, Any], gates: Mapping[str, str], role: Role) -> Recipe:
    """Return the recipe of a trial. parts: the study's column `space`. Raises NightpressError(invalid_recipe)."""
    part = "choose" if role == "search" else "judge"
    raw = {**point, "gates": dict(gates), "evaluate": parts["evaluate"], "screen": role == "search" and parts["screen"]}
    if "calibration" in parts:
        raw["calibration"] = parts["calibration"]
    recipe = parse_recipe(raw)
    evaluate = [
        entry.model_copy(update={"part": part}) if isinstance(entry, Quality) else entry for entry in recipe.evaluate
    ]
    return recipe.model_copy(update={"evaluate": tuple(evaluate)})


def surely_too_large(recipe: Recipe, sizes: Sequence[int], source: int) -> bool:
    """Return whether every form is surely larger than a gate on the size allows. sizes: estimated bytes of each."""
    for gate in recipe.parsed_gates():
        if gate.metric == "size" and gate.operator in {"<=", "<"}:
            allowed = {
                "absolute": gate.value,
                "change": (1 + gate.value) * source,
                "share": gate.value * source,
                "times": gate.value * source,
            }[gate.relative]
            if min(sizes) > _SIZE_SLACK * allowed:
                return True
    return False
