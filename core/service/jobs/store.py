"""The job store, on SQLite or PostgreSQL. It consists of parts, and each part writes its own transitions."""

from sqlalchemy import Engine

from nightpress.core.service.jobs.attempts import JobAttempts
from nightpress.core.service.jobs.claim_statements import Caps
from nightpress.core.service.jobs.claims import JobClaims
from nightpress.core.service.jobs.expiry import JobExpiry
from nightpress.core.service.jobs.queries import JobReader
from nightpress.core.service.jobs.requests import JobRequests
from nightpress.core.service.jobs.roster import WorkerRoster
from nightpress.core.service.jobs.source_figures import SourceFigures
from nightpress.core.service.jobs.submission import JobSubmission


class JobStore:
    """The parts of the job store on one engine. Safe to share between threads."""

    def __init__(self, engine: Engine, caps: Caps | None = None, *, oldest_share: float = 0.0) -> None:
        """oldest_share: the fraction of claims, 0 to 1, that takes the oldest job, whatever its priority."""
        self.engine = engine
        self.reader = JobReader(engine)
        self.submission = JobSubmission(engine)
        self.requests = JobRequests(engine, self.reader)
        self.claims = JobClaims(engine, caps or Caps(), oldest_share=oldest_share)
        self.attempts = JobAttempts(engine)
        self.expiry = JobExpiry(engine)
        self.roster = WorkerRoster(engine)
        self.sources = SourceFigures(engine)
