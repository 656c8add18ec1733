"""Threads of the control process that fetch from sources, and verify what is too large to be verified within a request.

Any number of replicas may run at the same time. Each row has one owner at a time, by a claim that expires. A process that takes over
continues after the last complete file.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sqlalchemy import ColumnElement, Engine, or_, select, update

from nightpress.core.database import db_now, statement, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.ids import new_id
from nightpress.core.service.claims import Claim
from nightpress.core.service.registry.datasets import DataSetRegistry
from nightpress.core.service.registry.models import ModelRegistry

AT_A_TIME = 2
TTL_S = 60.0
_PAUSE_S = 30.0  #: seconds before a row that failed with a retryable error is tried again
_PATIENCE_S = 24 * 3600.0  #: age in seconds at which such a row is failed for good
#: seconds of unexpected errors after which a row is failed for good; shorter, because these seldom pass by themselves
_PATIENCE_WITH_US_S = 600.0

log = logging.getLogger(__name__)


class Intake:
    """Takes in rows; a control process has one Intake. `advance` starts what is due and renews the claims of what runs.

    `advance` does not wait for the transfers.
    """

    def __init__(
        self,
        engine: Engine,
        registries: Sequence[ModelRegistry | DataSetRegistry],
        *,
        ttl_s: float = TTL_S,
        pause_s: float = _PAUSE_S,
        patience_with_us_s: float = _PATIENCE_WITH_US_S,
    ) -> None:
        self._engine = engine
        self._registries = registries
        self._ttl_s = ttl_s
        self._pause_s = pause_s
        self._patience_with_us_s = patience_with_us_s
        self._threads = ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="intake")
        self._lock = threading.Lock()
        self._running: dict[str, tuple[ModelRegistry | DataSetRegistry, Claim]] = {}
        self._failing_since: dict[str, float] = {}  #: row → monotonic time of this process's first unexpected error

    def advance(self) -> None:
        with self._lock:
            running = list(self._running.values())
        for registry, claim in running:
            self._renew(registry, claim)
        for _ in range(AT_A_TIME - len(running)):
            found = self._claim_next()
            if found is None:
                return
            with self._lock:
                self._running[found[1].claim_id] = found
            self._threads.submit(self._run, *found)

    def close(self) -> None:
        """Stop the running work and release its claims, so that another process can continue at once."""
        with self._lock:
            running = list(self._running.values())
        for _, claim in running:
            claim.lost.set()
        self._threads.shutdown(wait=True)
        for registry, claim in running:
            self._release(registry, claim, 0.0)

    def _claim_next(self) -> tuple[ModelRegistry | DataSetRegistry, Claim] | None:
        for registry in self._registries:
            table = registry.table
            free = or_(table.c.claim_until.is_(None), table.c.claim_until < db_now())
            due: tuple[ColumnElement[bool], ...] = (
                table.c.state.in_(("fetching", "verifying")),
                table.c.deleted_at.is_(None),
                free,
            )
            with transaction(self._engine, read_only=True) as connection:
                ids = connection.scalars(select(table.c.id).where(*due).order_by(table.c.created_at).limit(10)).all()
            for row_id in ids:
                claim = Claim(row_id, new_id("clm"))
                mine = update(table).where(table.c.id == row_id, *due)
                with statement(self._engine) as connection:
                    values = {"claim_id": claim.claim_id, "claim_until": db_now(self._ttl_s)}
                    if connection.execute(mine.values(**values)).rowcount:
                        return registry, claim
        return None

    def _run(self, registry: ModelRegistry | DataSetRegistry, claim: Claim) -> None:
        try:
            registry.take_in(claim)
        except NightpressError as error:
            if claim.lost.is_set():
                return
            log.warning("The %s %s could not be taken in now: %s", registry.noun, claim.row_id, error)
            self._put_off(registry, claim, error, _PATIENCE_S)
        except Exception:
            log.exception("The %s %s: an unexpected error", registry.noun, claim.row_id)
            since = self._failing_since.setdefault(claim.row_id, time.monotonic())
            patience_s = 0.0 if time.monotonic() - since >= self._patience_with_us_s else _PATIENCE_S
            self._put_off(registry, claim, _unexpected(registry.noun), patience_s)
        else:
            self._failing_since.pop(claim.row_id, None)
        finally:
            with self._lock:
                self._running.pop(claim.claim_id, None)

    def _put_off(
        self, registry: ModelRegistry | DataSetRegistry, claim: Claim, error: NightpressError, patience_s: float
    ) -> None:
        try:
            if registry.give_up(claim, error, older_than_s=patience_s):
                self._failing_since.pop(claim.row_id, None)
            else:
                self._release(registry, claim, self._pause_s)
        except NightpressError as away:  # the database does not answer: the claim expires by itself
            log.warning("The claim of %s %s stays: %s", registry.noun, claim.row_id, away)

    def _renew(self, registry: ModelRegistry | DataSetRegistry, claim: Claim) -> None:
        values = {"claim_until": db_now(self._ttl_s), "progress": claim.progress}
        mine = (registry.table.c.id == claim.row_id, registry.table.c.claim_id == claim.claim_id)
        kept = update(registry.table).where(*mine, registry.table.c.deleted_at.is_(None)).values(**values)
        with statement(self._engine) as connection:
            if not connection.execute(kept).rowcount:
                claim.lost.set()

    def _release(self, registry: ModelRegistry | DataSetRegistry, claim: Claim, pause_s: float) -> None:
        mine = (registry.table.c.id == claim.row_id, registry.table.c.claim_id == claim.claim_id)
        with statement(self._engine) as connection:
            freed = update(registry.table).where(*mine).values(claim_id=None, claim_until=db_now(pause_s))
            connection.execute(freed)


def _unexpected(noun: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INTERNAL,
        f"The {noun} could not be read, for a reason that nobody foresaw.",
        hint="The control process's log says which. Save it again in another way, or ask for help.",
    )
