"""A service without processes for tests of studies: the control process's steps, and workers that answer at once with a made-up figure.

The trials are real rows and real jobs with claims and leases. Only the pressing is replaced by a function of the recipe.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine

from nightpress.core.database import make_engine
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import Manifest
from nightpress.core.service.compose import Resources
from nightpress.core.service.jobs.records import Claimed, Succeeded, WorkerOffer
from nightpress.core.service.studies.searching import Searching
from nightpress.core.settings import Settings
from nightpress.core.wire.models import ModelCreate
from nightpress.core.wire.studies import StudyRequest, StudyView, TrialView
from tests.trials import bits_of, report_of

TENANT = "default"
#: eighty recipes: bits and group sizes of rounded weights
SPACE = [
    {
        "name": "rounded",
        "passes": [
            {
                "pass": "weight-only",
                "bits": {"choice": [2, 3, 4, 5, 6, 7, 8]},
                "group_size": {"choice": [16, 32, 64, 128]},
                "symmetric": {"choice": [True, False]},
                "ranges": {"choice": ["extremes", "least-error"]},
            }
        ],
        "exports": ["compressed-tensors"],
    }
]
GATES = {"cosine": ">= 0.95"}
Answer = Callable[[dict[str, Any]], tuple[float, float]]  #: (recipe) → (size as a share of the source's, cosine)


class StudyWorld:
    """An installation with one registered model, `tiny`."""

    def __init__(self, folder: Path, sql_url: str, model: Path, **more: Any) -> None:
        settings = Settings(_env_file=None, data_dir=folder, database_url=sql_url, model_roots=[model.parent], **more)
        self._open(make_engine(sql_url), settings)
        self.model = self.resources.models.create(TENANT, ModelCreate(name="tiny", path=str(model))).id

    @classmethod
    def beside(cls, engine: Engine, settings: Settings) -> Self:
        """The studies of an installation that a test has already."""
        world = cls.__new__(cls)
        world._open(engine, settings)
        return world

    def _open(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.resources = Resources(settings, engine)
        self.store = self.resources.store
        self.studies = self.resources.studies
        self.ledger = self.resources.study_ledger
        self.rung: list[str] = []
        self.held: list[Claimed] = []

    def replica(self) -> Searching:
        """One replica of the control process's part for studies."""
        resources = self.resources
        return Searching(self.ledger, resources.jobs, self.store, resources.models, self.rung.append)

    def fill(self, control: Searching) -> None:
        """Advance until no more trials are begun: on a busy machine, one step may begin only some."""
        before = -1
        while before != (now := sum(study.proposed for study in self.ledger.active())):
            before = now
            control.advance()

    def create(self, tenant_id: str = TENANT, key_id: str | None = None, **changes: Any) -> StudyView:
        wanted = {"model": "tiny", "gates": GATES, "space": SPACE, "trials": 12, "parallel": 2} | changes
        return self.studies.create(tenant_id, StudyRequest.model_validate(wanted), key_id=key_id)

    def get(self, study: StudyView) -> StudyView:
        return self.studies.store.get(TENANT, study.id)

    def trials(self, study: StudyView) -> list[TrialView]:
        return self.studies.store.trials(TENANT, study.id, cursor=None, limit=5000)[0]

    def claim_all(self) -> None:
        """Give every queued job to a worker."""
        offer = WorkerOffer("w", "cpu", "cpu", 1 << 40, 1)
        while (claimed := self.store.claims.claim(offer, ttl_s=600)) is not None:
            self.held.append(claimed)

    def end(self, claimed: Claimed, answer: Answer = bits_of) -> None:
        """End a job well."""
        self.held.remove(claimed)
        report = report_of(claimed.job.id, claimed.job.recipe, *answer(claimed.job.recipe))
        manifest = Manifest(
            job_id=claimed.job.id, attempt=claimed.lease.attempt, verdict=report.verdict, artifacts=(), report=()
        )
        outcome = Succeeded(report.verdict, manifest, report.model_dump(mode="json"))
        assert self.store.attempts.finish(claimed.lease, outcome)

    def fail(self, claimed: Claimed) -> None:
        self.held.remove(claimed)
        fault = NightpressError(ErrorCode.NUMERICAL_FAILURE, "A weight is not finite.")
        assert self.store.attempts.fail(claimed.lease, fault, backoff_s=0) == "failed"

    def run(self, study: StudyView, answer: Answer = bits_of, *, order: int = 0, replicas: int = 1) -> StudyView:
        """Advance the study to its end. order: the seed of the order in which running jobs end."""
        random_order = random.Random(order)
        controls = [self.replica() for _ in range(replicas)]
        for _ in range(2000):
            for control in controls:
                control.advance()
            now = self.get(study)
            if now.state in {"succeeded", "failed", "cancelled"}:
                return now
            self.claim_all()
            if self.held:
                self.end(random_order.choice(self.held), answer)
        raise AssertionError(f"the study did not end: {self.get(study)}")
