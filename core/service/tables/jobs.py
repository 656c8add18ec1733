"""The tables of jobs. The constraints repeat the rules of the store, so that no other writer can break them either."""

import sqlalchemy as sa

from nightpress.core.database import JsonType, UtcDateTime, metadata

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    # No foreign key: a tenant is just the name in its API keys, and every job is submitted with one of them.
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("verdict", sa.String(12)),
    sa.Column("phase", sa.String(16)),
    sa.Column("progress", sa.Float, nullable=False, server_default=sa.text("0")),
    sa.Column("pass_index", sa.Integer),
    sa.Column("eta_s", sa.Float),
    sa.Column("message", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("labels", JsonType, nullable=False),
    sa.Column("queue", sa.String(8), nullable=False),
    #: why the plan chose this queue, for users
    sa.Column("queue_reason", sa.Text, nullable=False, server_default=sa.text("''")),
    sa.Column("needs_memory", sa.BigInteger, nullable=False),
    #: bytes of each of its GPUs; see NOT_FOR_OLD_WORKERS in core/service/jobs/records.py
    sa.Column("needs_gpu_memory", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    #: GPUs that a job of the queue `gpu` holds; means nothing on the queue `cpu`
    sa.Column("needs_gpus", sa.Integer, nullable=False, server_default=sa.text("1")),
    #: the worker that holds GPUs back for this queued job, and until when
    sa.Column("held_by", sa.String(80)),
    sa.Column("held_until", UtcDateTime),
    sa.Column("model_id", sa.ForeignKey("models.id"), nullable=False, index=True),
    sa.Column("model_name", sa.String(64), nullable=False),
    sa.Column("model_digest", sa.String(80), nullable=False),
    sa.Column("recipe", JsonType, nullable=False),
    sa.Column("data", JsonType, nullable=False),
    #: digest of what decides the result: model, recipe, data, engine; NULL in jobs older than the column
    sa.Column("fingerprint", sa.String(64)),
    #: the version of the code that made the result; a worker's may differ from that of the API
    sa.Column("engine", sa.String(40)),
    #: the job whose result this job shares instead of running; the files belong to that job
    sa.Column("reused_from", sa.String(40)),
    #: kept, going or gone: pruned artifacts are `going` while their files are removed, and are no longer shown
    sa.Column("artifacts_state", sa.String(8), nullable=False, server_default=sa.text("'kept'")),
    sa.Column("attempt", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("failures", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.Column("max_failures", sa.Integer, nullable=False),
    sa.Column("error", JsonType),
    sa.Column("error_code", sa.String(40)),
    sa.Column("retry_of", sa.ForeignKey("jobs.id", ondelete="SET NULL")),
    #: whether an accepted result becomes the latest of the model's name
    sa.Column("promote", sa.Boolean, nullable=False, server_default=sa.text("true")),
    #: the key that submitted it
    sa.Column("created_by", sa.String(8)),
    #: the span that submitted it; the spans of its attempts belong to the same trace, on any machine and at any later time
    sa.Column("traceparent", sa.String(55)),
    #: the study that the job is a trial of; no foreign key: jobs and studies are pruned each in their time
    sa.Column("study_id", sa.String(40)),
    #: addresses that its artifacts are delivered to, if it is accepted
    sa.Column("destinations", JsonType, nullable=False, server_default=sa.text("'[]'")),
    sa.Column("worker_id", sa.String(80)),
    sa.Column("lease_id", sa.String(40)),
    sa.Column("lease_expires_at", UtcDateTime),
    sa.Column("queue_limit_s", sa.Float),
    sa.Column("run_limit_s", sa.Float, nullable=False),
    sa.Column("stall_s", sa.Float, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("run_after", UtcDateTime, nullable=False),
    #: the queue deadline while the job has never run; cleared by the first claim
    sa.Column("start_before", UtcDateTime),
    sa.Column("started_at", UtcDateTime),
    sa.Column("progressed_at", UtcDateTime),
    sa.Column("finished_at", UtcDateTime),
    #: the last numbers used in job_events and, counting dropped lines, in job_logs
    sa.Column("event_seq", sa.Integer, nullable=False),
    sa.Column("log_seq", sa.Integer, nullable=False, server_default=sa.text("0")),
    sa.CheckConstraint("state IN ('queued','running','cancelling','succeeded','failed','cancelled')", name="state"),
    sa.CheckConstraint("(state IN ('running','cancelling')) = (lease_id IS NOT NULL)", name="lease"),
    sa.CheckConstraint("(lease_id IS NULL) = (lease_expires_at IS NULL)", name="lease_expiry"),
    sa.CheckConstraint("(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
    sa.CheckConstraint("(state = 'succeeded') = (verdict IS NOT NULL)", name="verdict"),
    sa.CheckConstraint("verdict IN ('accepted','rejected')", name="verdict_value"),
    sa.CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="error"),
    sa.CheckConstraint("(error IS NULL) = (error_code IS NULL)", name="error_code"),
    sa.CheckConstraint("queue IN ('cpu','gpu')", name="queue"),
    sa.CheckConstraint("progress >= 0 AND progress <= 1", name="progress"),
    sa.CheckConstraint("failures >= 0 AND failures <= max_failures AND max_failures >= 1", name="failures"),
    sa.CheckConstraint("attempt >= 0 AND needs_memory >= 0 AND event_seq >= 1", name="counters"),
    postgresql_with={"fillfactor": 90},  # leaves room on each page for the next version of a row
)

#: Conditions of the partial indexes. Statements must write them as text and not as bound parameters, so that the index is used.
IS_QUEUED: sa.ColumnElement[bool] = jobs.c.state == sa.literal_column("'queued'")
IS_LEASED: sa.ColumnElement[bool] = jobs.c.lease_id.is_not(None)

_QUEUED = sa.text("state = 'queued'")
#: For claims: a queue's tenants in turn, and each tenant's best job first. Also for counting a tenant's queued jobs.
sa.Index(
    "ix_jobs_claim",
    jobs.c.queue,
    jobs.c.tenant_id,
    jobs.c.priority.desc(),
    jobs.c.created_at,
    jobs.c.id,
    # The columns that decide whether a job fits, so that rows of jobs that do not fit are not read.
    postgresql_include=["run_after", "needs_memory", "needs_gpu_memory", "needs_gpus"],
    postgresql_where=_QUEUED,
    sqlite_where=_QUEUED,
)
_LEASED = sa.text("lease_id IS NOT NULL")
#: Claims count a tenant's running jobs with it; expiry and the workers' page read all running jobs, which are few. No index has a column
#: that a renewal changes: PostgreSQL then writes the new version of the row on the same page and updates no index (HOT).
sa.Index("ix_jobs_leased", jobs.c.tenant_id, postgresql_where=_LEASED, sqlite_where=_LEASED)
_START_BEFORE = sa.text("start_before IS NOT NULL")
sa.Index("ix_jobs_start_before", jobs.c.start_before, postgresql_where=_START_BEFORE, sqlite_where=_START_BEFORE)
_FINISHED = sa.text("finished_at IS NOT NULL")
#: For statistics over ended jobs, without reading their rows.
sa.Index(
    "ix_jobs_finished",
    jobs.c.finished_at,
    jobs.c.state,
    jobs.c.queue,
    jobs.c.error_code,
    postgresql_where=_FINISHED,
    sqlite_where=_FINISHED,
)
_REUSABLE = sa.text("state = 'succeeded' AND reused_from IS NULL")
sa.Index(
    "ix_jobs_reusable",
    jobs.c.tenant_id,
    jobs.c.fingerprint,
    jobs.c.finished_at,
    postgresql_where=_REUSABLE,
    sqlite_where=_REUSABLE,
)
_REUSED = sa.text("reused_from IS NOT NULL")
sa.Index("ix_jobs_reused", jobs.c.reused_from, postgresql_where=_REUSED, sqlite_where=_REUSED)
sa.Index("ix_jobs_listing", jobs.c.tenant_id, jobs.c.created_at, jobs.c.id)
sa.Index("ix_jobs_listing_by_state", jobs.c.tenant_id, jobs.c.state, jobs.c.created_at, jobs.c.id)


def _job_id() -> sa.Column[str]:
    return sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


job_events = sa.Table(
    "job_events",
    metadata,
    _job_id(),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("data", JsonType, nullable=False),
    sa.CheckConstraint("seq >= 1", name="seq"),
)

job_logs = sa.Table(
    "job_logs",
    metadata,
    _job_id(),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("level", sa.String(8), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
)

job_attempts = sa.Table(
    "job_attempts",
    metadata,
    _job_id(),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("lease_id", sa.String(40), nullable=False, unique=True),
    sa.Column("worker_id", sa.String(80), nullable=False),
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("outcome", sa.String(12)),
    sa.Column("error", JsonType),
    sa.Column("swept", sa.Boolean, nullable=False, server_default=sa.text("false")),
    sa.Column("gpus", JsonType),  #: uuid, name and memory of each GPU that it holds; NULL on the queue `cpu`
    sa.Column(
        "memory_limit", sa.BigInteger
    ),  #: bytes of the host's memory that it may use; NULL: all that its worker offers
    sa.Column(
        "cost_micros", sa.BigInteger
    ),  #: millionths of the currency; NULL until it is counted, after the attempt's end
    sa.CheckConstraint("outcome IN ('succeeded','failed','cancelled','released','lost')", name="outcome"),
    sa.CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", name="closed"),
)
#: Joins a job with its latest attempt, which is the running one while the job is leased.
IS_LATEST_ATTEMPT: sa.ColumnElement[bool] = sa.and_(
    job_attempts.c.job_id == jobs.c.id, job_attempts.c.number == jobs.c.attempt
)

_SWEEPABLE = sa.text("outcome <> 'succeeded' AND NOT swept")
_NOT_COUNTED = sa.text("cost_micros IS NULL")
sa.Index(
    "ix_job_attempts_not_counted",
    job_attempts.c.job_id,
    job_attempts.c.number,
    postgresql_where=_NOT_COUNTED,
    sqlite_where=_NOT_COUNTED,
)
sa.Index("ix_job_attempts_sweepable", job_attempts.c.finished_at, postgresql_where=_SWEEPABLE, sqlite_where=_SWEEPABLE)

#: A prefix of a recipe on a model, with checkpoints in storage. `lease_id`: the lease of the attempt that writes it or wrote it last.
checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    # No foreign key: the checkpoints of a deleted job are pruned like all others.
    sa.Column("job_id", sa.String(40), nullable=False),
    sa.Column("lease_id", sa.String(40), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),  #: bytes of all its files
    sa.Column("used_at", UtcDateTime, nullable=False, index=True),
    sa.CheckConstraint("size >= 0", name="size"),
)

checkpoint_files = sa.Table(
    "checkpoint_files",
    metadata,
    sa.Column("digest", sa.ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True),
    sa.Column("path", sa.String(512), primary_key=True),  #: relative to work/
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("job_id", sa.String(40), nullable=False),  #: the job whose attempt wrote it
)

#: The outputs of a source in storage, as the job `job_id` measured them. The digest says for what: see core/handoff/source_outputs.py.
source_figures = sa.Table(
    "source_figures",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("tenant_id", sa.String(64), nullable=False),
    sa.Column("model_digest", sa.String(80), nullable=False),
    # No foreign key: the outputs stay when the job is deleted.
    sa.Column("job_id", sa.String(40), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("outdated", sa.Boolean, nullable=False),  #: a user wants the source to be measured anew
    sa.Column("measured_at", UtcDateTime, nullable=False),
    sa.Column("used_at", UtcDateTime, nullable=False, index=True),
    sa.CheckConstraint("size >= 0", name="size"),
    sa.Index("ix_source_figures_model", "tenant_id", "model_digest"),
)

job_artifacts = sa.Table(
    "job_artifacts",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("format", sa.String(40), nullable=False),
    sa.Column("path", sa.String(512), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.String(80), nullable=False),
    sa.Column("consumer", sa.String(200), nullable=False),
    sa.Column("files", JsonType, nullable=False),
    sa.UniqueConstraint("job_id", "path"),
)

job_reports = sa.Table(
    "job_reports",
    metadata,
    _job_id(),
    sa.Column("report", JsonType, nullable=False),
    sa.Column("files", JsonType, nullable=False),
)

job_metrics = sa.Table(
    "job_metrics",
    metadata,
    _job_id(),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("subject", sa.String(200), nullable=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("value", sa.Float, nullable=False),
    sa.Column("unit", sa.String(40), nullable=False),
    sa.Column("low", sa.Float),
    sa.Column("high", sa.Float),
)

#: The result of a POST with an Idempotency-Key: a job, written in the same transaction, or the stored answer.
idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("tenant_id", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("job_id", sa.ForeignKey("jobs.id", ondelete="CASCADE")),
    sa.Column("attempt_id", sa.String(40)),  #: the request that has reserved the key
    sa.Column("locked_until", UtcDateTime),
    sa.Column("status", sa.Integer),
    sa.Column("headers", JsonType),
    sa.Column("body", sa.LargeBinary),  #: compressed; NULL if it held a secret
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("(job_id IS NULL) = (attempt_id IS NOT NULL)", name="one_kind"),
    sa.Index("ix_idempotency_keys_created_at", "created_at"),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String(80), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("queue", sa.String(8), nullable=False),
    sa.Column("device", sa.String(200), nullable=False),
    sa.Column("memory", sa.BigInteger, nullable=False),
    sa.Column("gpu_memory", sa.BigInteger),
    sa.Column("gpu_memory_used", sa.BigInteger),
    #: uuid, name, memory and bytes in use of each GPU that it offers; NULL: a worker of an earlier version, with one GPU
    sa.Column("gpus", JsonType),
    #: [memory, count] of each kind of GPU: the most GPUs of the kind that one job can have
    sa.Column("gpu_kinds", JsonType),
    sa.Column(
        "cpu_jobs", sa.Integer, nullable=False, server_default=sa.text("0")
    ),  #: CPU jobs that it runs beside GPU jobs
    sa.Column("threads", sa.Integer, nullable=False),
    sa.Column("version", sa.String(40), nullable=False),
    sa.Column("draining", sa.Boolean, nullable=False),
    sa.Column("unfit", sa.String(1000)),  #: the fault of its machine; while there is one, the worker claims no jobs
    sa.Column(
        "vllm", sa.Boolean, nullable=False, server_default=sa.false()
    ),  #: whether its jobs also run artifacts in vLLM
    sa.Column("started_at", UtcDateTime, nullable=False),
    sa.Column("last_seen_at", UtcDateTime, nullable=False),
    sa.Column("left_at", UtcDateTime),  #: when it stopped; plans also count workers that stopped lately
    sa.CheckConstraint("queue IN ('cpu','gpu')", name="queue"),
)
