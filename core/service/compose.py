"""Builds the stores and services on SQL and object storage, for API, control process and worker."""

import logging
from functools import cached_property
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from nightpress.core.artifacts.open import open_store
from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.passes import catalog
from nightpress.core.service.access.audit import AuditLog
from nightpress.core.service.access.idempotency import IdempotencyBook
from nightpress.core.service.access.issuing import KeyIssuer
from nightpress.core.service.access.keys import KeyRing
from nightpress.core.service.access.oidc.people import PeopleBook
from nightpress.core.service.access.oidc.sessions import SessionBook
from nightpress.core.service.access.quotas import QuotaBook
from nightpress.core.service.costs.ledger import CostLedger
from nightpress.core.service.costs.prices import PriceList
from nightpress.core.service.deliveries.addresses import prefix_parts
from nightpress.core.service.deliveries.credentials import CredentialStore
from nightpress.core.service.deliveries.destinations import ModelDestinationStore
from nightpress.core.service.deliveries.store import DeliveryStore
from nightpress.core.service.jobs.checkpoints import CheckpointIndex
from nightpress.core.service.jobs.claim_statements import Caps
from nightpress.core.service.jobs.retention import JobRetention
from nightpress.core.service.jobs.service import JobService
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.promotions.store import PromotionStore
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.schedules.service import ScheduleService
from nightpress.core.service.schedules.store import ScheduleStore
from nightpress.core.service.signing.keys import signing_key
from nightpress.core.service.signing.store import SigningStore
from nightpress.core.service.studies.ledger import StudyLedger
from nightpress.core.service.studies.service import StudyService
from nightpress.core.service.studies.store import StudyStore
from nightpress.core.service.trackers.contents import Contents
from nightpress.core.service.trackers.store import TrackerStore
from nightpress.core.service.vault import open_vault
from nightpress.core.service.webhooks.signing import open_keeper
from nightpress.core.service.webhooks.store import WebhookStore
from nightpress.core.settings import Settings

if TYPE_CHECKING:
    from nightpress.core.service.access.oidc.sign_in import SignIn

log = logging.getLogger(__name__)
#: fraction of the claims that takes the oldest job, so that low priorities progress in a queue that never empties
_OLDEST_SHARE = 1 / 8


class Resources:
    """The stores and services of a process. Each is made at its first use and then kept.

    The constructor also allows recipes, in this process, to use the passes of the packages that the settings name.
    """

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings = settings
        self.engine = engine
        for fault in catalog.allow(settings.passes):
            log.warning("%s", fault)

    def open(self) -> None:
        """Make every part now, so that a wrong setting ends the process at its start and not at a later request."""
        for name, part in vars(Resources).items():
            if isinstance(part, cached_property):
                getattr(self, name)

    def close(self) -> None:
        """Close the connections to the database and to the provider that people sign in with."""
        if "sign_in" in vars(self) and self.sign_in is not None:
            self.sign_in.close()
        self.engine.dispose()

    @cached_property
    def objects(self) -> ObjectStore:
        return open_store(self.settings)

    @cached_property
    def store(self) -> JobStore:
        settings = self.settings
        caps = Caps(
            settings.max_running_jobs, settings.max_gpu_seconds_month, settings.max_cost_day, settings.max_cost_month
        )
        return JobStore(self.engine, caps, oldest_share=_OLDEST_SHARE)

    @cached_property
    def jobs(self) -> JobService:
        return JobService(self.store, self.models, self.datasets, self.quotas, self.settings)

    @cached_property
    def checkpoints(self) -> CheckpointIndex:
        return CheckpointIndex(self.engine)

    @cached_property
    def retention(self) -> JobRetention:
        return JobRetention(self.engine, self.objects)

    @cached_property
    def models(self) -> ModelRegistry:
        return ModelRegistry(self.engine, self.objects, self.settings)

    @cached_property
    def datasets(self) -> DataSetRegistry:
        return DataSetRegistry(self.engine, self.objects, self.settings)

    @cached_property
    def schedule_store(self) -> ScheduleStore:
        return ScheduleStore(self.engine)

    @cached_property
    def schedules(self) -> ScheduleService:
        return ScheduleService(self.schedule_store, self.jobs, self.studies, self.settings)

    @cached_property
    def study_ledger(self) -> StudyLedger:
        return StudyLedger(self.engine, self.costs.prices)

    @cached_property
    def studies(self) -> StudyService:
        return StudyService(
            StudyStore(self.engine, self.costs.prices), self.study_ledger, self.jobs, self.store, self.models
        )

    @cached_property
    def costs(self) -> CostLedger:
        return CostLedger(self.engine, PriceList.of(self.settings))

    @cached_property
    def promotions(self) -> PromotionStore:
        return PromotionStore(self.engine)

    @cached_property
    def webhooks(self) -> WebhookStore:
        return WebhookStore(self.engine, open_keeper(self.settings), self.settings)

    @cached_property
    def signing(self) -> SigningStore:
        return SigningStore(self.engine, signing_key(self.settings))

    @cached_property
    def credentials(self) -> CredentialStore:
        return CredentialStore(self.engine, open_vault(self.settings))

    @cached_property
    def deliveries(self) -> DeliveryStore:
        for prefix in self.settings.destinations:
            prefix_parts(prefix)  # a wrong one ends the process at its start
        return DeliveryStore(self.engine, self.settings)

    @cached_property
    def model_destinations(self) -> ModelDestinationStore:
        return ModelDestinationStore(self.engine, self.settings)

    @cached_property
    def trackers(self) -> TrackerStore:
        return TrackerStore(self.engine)

    @cached_property
    def run_contents(self) -> Contents:
        return Contents(self.engine, self.objects, self.settings.objects_url)

    @cached_property
    def quotas(self) -> QuotaBook:
        return QuotaBook(self.engine, self.settings)

    @cached_property
    def keys(self) -> KeyRing:
        return KeyRing(self.engine)

    @cached_property
    def issuer(self) -> KeyIssuer:
        return KeyIssuer(self.engine)

    @cached_property
    def sessions(self) -> SessionBook:
        return SessionBook(self.engine, self.settings)

    @cached_property
    def sign_in(self) -> "SignIn | None":
        """None without OIDC_ISSUER. Raises NightpressError(internal) if the packages for it are missing."""
        if not self.settings.oidc_issuer:
            return None
        try:
            from nightpress.core.service.access.oidc.sign_in import SignIn
        except ImportError as error:
            raise NightpressError(
                ErrorCode.INTERNAL,
                f"NIGHTPRESS_OIDC_ISSUER is set, but {error.name} is not installed.",
                hint="Install it: pip install 'nightpress[oidc]'.",
            ) from error
        keeper = open_keeper(self.settings)
        return SignIn(self.settings, PeopleBook(self.engine), self.sessions, keeper.key_for)

    @cached_property
    def idempotency(self) -> IdempotencyBook:
        return IdempotencyBook(self.engine)

    @cached_property
    def audit(self) -> AuditLog:
        return AuditLog(self.engine)
