"""The webhooks of one installation, for tests: a store, a courier that the test drives, and jobs that end."""

import datetime as dt
import ipaddress
from pathlib import Path

from nightpress.core.database import make_engine
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.webhooks.courier import Courier
from nightpress.core.service.webhooks.signing import open_keeper
from nightpress.core.service.webhooks.store import WebhookStore
from nightpress.core.settings import Settings
from nightpress.core.wire.webhooks import WebhookCreate
from tests.jobs import add_model, claim, submit, succeeded

TENANT = "default"
LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


class World:
    def __init__(self, folder: Path, sql_url: str, *, inside: bool = True) -> None:
        self.settings = Settings(
            _env_file=None, data_dir=folder, database_url=sql_url, webhook_networks=[LOOPBACK] if inside else []
        )
        self.engine = make_engine(sql_url)
        add_model(self.engine)
        self.jobs = JobStore(self.engine)
        self.store = WebhookStore(self.engine, open_keeper(self.settings), self.settings)
        self.courier = Courier(self.store, self.settings)

    def hook(self, url: str) -> tuple[str, str]:
        made = self.store.create(TENANT, WebhookCreate(url=url, events=["job.succeeded", "job.failed"]))
        return made.webhook.id, made.secret

    def end_a_job(self) -> str:
        job_id = submit(self.jobs)
        claimed = claim(self.jobs)
        assert self.jobs.attempts.finish(claimed.lease, succeeded(claimed.lease))
        return job_id

    def try_all(self, now: dt.datetime | None = None) -> int:
        taken = self.store.take_due(now or self.store.now())
        for due in taken:
            self.courier.attempt(due, now)
        return len(taken)
