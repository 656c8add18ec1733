"""The tables of jobs. The constraints repeat the rules of the store, so that no other writer can break them either."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
    false,
    literal_column,
    text,
)

from nightpress.core.database import JsonType, UtcDateTime, metadata

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    # No foreign key: a tenant is just the name in its API keys, and every job is submitted with one of them.
    Column("tenant_id", String(64), nullable=False),
    Column("name", String(200), nullable=False),
    Column("state", String(12), nullable=False),
    Column("verdict", String(12)),
    Column("phase", String(16)),
    Column("progress", Float, nullable=False, server_default=text("0")),
    Column("pass_index", Integer),
    Column("eta_s", Float),
    Column("message", Text, nullable=False, server_default=text("''")),
    Column("priority", SmallInteger, nullable=False),
    Column("labels", JsonType, nullable=False),
    Column("queue", String(8), nullable=False),
    #: why the plan chose this queue, for users
    Column("queue_reason", Text, nullable=False, server_default=text("''")),
    Column("needs_memory", BigInteger, nullable=False),
    #: bytes of each of its GPUs; see NOT_FOR_OLD_WORKERS in core/service/jobs/records.py
    Column("needs_gpu_memory", BigInteger, nullable=False, server_default=text("0")),
    #: GPUs that a job of the queue `gpu` holds; means nothing on the queue `cpu`
    Column("needs_gpus", Integer, nullable=False, server_default=text("1")),
    #: the worker that holds GPUs back for this queued job, and until when
    Column("held_by", String(80)),
    Column("held_until", UtcDateTime),
    Column("model_id", ForeignKey("models.id"), nullable=False, index=True),
    Column("model_name", String(64), nullable=False),
    Column("model_digest", String(80), nullable=False),
    Column("recipe", JsonType, nullable=False),
    Column("data", JsonType, nullable=False),
    #: digest of what decides the result: model, recipe, data, engine; NULL in jobs older than the column
    Column("fingerprint", String(64)),
    #: the version of the code that made the result; a worker's may differ from that of the API
    Column("engine", String(40)),
    #: the job whose result this job shares instead of running; the files belong to that job
    Column("reused_from", String(40)),
    #: kept, going or gone: pruned artifacts are `going` while their files are removed, and are no longer shown
    Column("artifacts_state", String(8), nullable=False, server_default=text("'kept'")),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("max_failures", Integer, nullable=False),
    Column("error", JsonType),
    Column("error_code", String(40)),
    Column("retry_of", ForeignKey("jobs.id", ondelete="SET NULL")),
    #: whether an accepted result becomes the latest of the model's name
    Column("promote", Boolean, nullable=False, server_default=text("true")),
    #: the key that submitted it
    Column("created_by", String(8)),
    #: the span that submitted it; the spans of its attempts belong to the same trace, on any machine and at any later time
    Column("traceparent", String(55)),
    #: the study that the job is a trial of; no foreign key: jobs and studies are pruned each in their time
    Column("study_id", String(40)),
    #: addresses that its artifacts are delivered to, if it is accepted
    Column("destinations", JsonType, nullable=False, server_default=text("'[]'")),
    Column("worker_id", String(80)),
    Column("lease_id", String(40)),
    Column("lease_expires_at", UtcDateTime),
    Column("queue_limit_s", Float),
    Column("run_limit_s", Float, nullable=False),
    Column("stall_s", Float, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("run_after", UtcDateTime, nullable=False),
    #: the queue deadline while the job has never run; cleared by the first claim
    Column("start_before", UtcDateTime),
    Column("started_at", UtcDateTime),
    Column("progressed_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    #: the last numbers used in job_events and, counting dropped lines, in job_logs
    Column("event_seq", Integer, nullable=False),
    Column("log_seq", Integer, nullable=False, server_default=text("0")),
    CheckConstraint("state IN ('queued','running','cancelling','succeeded','failed','cancelled')", name="state"),
    CheckConstraint("(state IN ('running','cancelling')) = (lease_id IS NOT NULL)", name="lease"),
    CheckConstraint("(lease_id IS NULL) = (lease_expires_at IS NULL)", name="lease_expiry"),
    CheckConstraint("(state IN ('succeeded','failed','cancelled')) = (finished_at IS NOT NULL)", name="finished"),
    CheckConstraint("(state = 'succeeded') = (verdict IS NOT NULL)", name="verdict"),
    CheckConstraint("verdict IN ('accepted','rejected')", name="verdict_value"),
    CheckConstraint("(state = 'failed') = (error IS NOT NULL)", name="error"),
    CheckConstraint("(error IS NULL) = (error_code IS NULL)", name="error_code"),
    CheckConstraint("queue IN ('cpu','gpu')", name="queue"),
    CheckConstraint("progress >= 0 AND progress <= 1", name="progress"),
    CheckConstraint("failures >= 0 AND failures <= max_failures AND max_failures >= 1", name="failures"),
    CheckConstraint("attempt >= 0 AND needs_memory >= 0 AND event_seq >= 1", name="counters"),
    postgresql_with={"fillfactor": 90},  # leaves room on each page for the next version of a row
)

#: Conditions of the partial indexes. Statements must write them as text and not as bound parameters, so that the index is used.
IS_QUEUED: ColumnElement[bool] = jobs.c.state == literal_column("'queued'")
IS_LEASED: ColumnElement[bool] = jobs.c.lease_id.is_not(None)

_QUEUED = text("state = 'queued'")
#: For claims: a queue's tenants in turn, and each tenant's best job first. Also for counting a tenant's queued jobs.
Index(
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
_LEASED = text("lease_id IS NOT NULL")
#: Claims count a tenant's running jobs with it; expiry and the workers' page read all running jobs, which are few. No index has a column
#: that a renewal changes: PostgreSQL then writes the new version of the row on the same page and updates no index (HOT).
Index("ix_jobs_leased", jobs.c.tenant_id, postgresql_where=_LEASED, sqlite_where=_LEASED)
_START_BEFORE = text("start_before IS NOT NULL")
Index("ix_jobs_start_before", jobs.c.start_before, postgresql_where=_START_BEFORE, sqlite_where=_START_BEFORE)
_FINISHED = text("finished_at IS NOT NULL")
#: For statistics over ended jobs, without reading their rows.
Index(
    "ix_jobs_finished",
    jobs.c.finished_at,
    jobs.c.state,
    jobs.c.queue,
    jobs.c.error_code,
    postgresql_where=_FINISHED,
    sqlite_where=_FINISHED,
)
_REUSABLE = text("state = 'succeeded' AND reused_from IS NULL")
Index(
    "ix_jobs_reusable",
    jobs.c.tenant_id,
    jobs.c.fingerprint,
    jobs.c.finished_at,
    postgresql_where=_REUSABLE,
    sqlite_where=_REUSABLE,
)
_REUSED = text("reused_from IS NOT NULL")
Index("ix_jobs_reused", jobs.c.reused_from, postgresql_where=_REUSED, sqlite_where=_REUSED)
Index("ix_jobs_listing", jobs.c.tenant_id, jobs.c.created_at, jobs.c.id)
Index("ix_jobs_listing_by_state", jobs.c.tenant_id, jobs.c.state, jobs.c.created_at, jobs.c.id)


def _job_id() -> Column[str]:
    return Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


job_events = Table(
    "job_events",
    metadata,
    _job_id(),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("data", JsonType, nullable=False),
    CheckConstraint("seq >= 1", name="seq"),
)

job_logs = Table(
    "job_logs",
    metadata,
    _job_id(),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", UtcDateTime, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("level", String(8), nullable=False),
    Column("text", Text, nullable=False),
)

job_attempts = Table(
    "job_attempts",
    metadata,
    _job_id(),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("lease_id", String(40), nullable=False, unique=True),
    Column("worker_id", String(80), nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("outcome", String(12)),
    Column("error", JsonType),
    Column("swept", Boolean, nullable=False, server_default=text("false")),
    Column("gpus", JsonType),  #: uuid, name and memory of each GPU that it holds; NULL on the queue `cpu`
    Column("memory_limit", BigInteger),  #: bytes of the host's memory that it may use; NULL: all that its worker offers
    Column("cost_micros", BigInteger),  #: millionths of the currency; NULL until it is counted, after the attempt's end
    CheckConstraint("outcome IN ('succeeded','failed','cancelled','released','lost')", name="outcome"),
    CheckConstraint("(outcome IS NULL) = (finished_at IS NULL)", name="closed"),
)
#: Joins a job with its latest attempt, which is the running one while the job is leased.
IS_LATEST_ATTEMPT: ColumnElement[bool] = and_(
    job_attempts.c.job_id == jobs.c.id, job_attempts.c.number == jobs.c.attempt
)

_SWEEPABLE = text("outcome <> 'succeeded' AND NOT swept")
_NOT_COUNTED = text("cost_micros IS NULL")
Index(
    "ix_job_attempts_not_counted",
    job_attempts.c.job_id,
    job_attempts.c.number,
    postgresql_where=_NOT_COUNTED,
    sqlite_where=_NOT_COUNTED,
)
Index("ix_job_attempts_sweepable", job_attempts.c.finished_at, postgresql_where=_SWEEPABLE, sqlite_where=_SWEEPABLE)

#: A prefix of a recipe on a model, with checkpoints in storage. `lease_id`: the lease of the attempt that writes it or wrote it last.
checkpoints = Table(
    "checkpoints",
    metadata,
    Column("digest", String(64), primary_key=True),
    # No foreign key: the checkpoints of a deleted job are pruned like all others.
    Column("job_id", String(40), nullable=False),
    Column("lease_id", String(40), nullable=False),
    Column("size", BigInteger, nullable=False),  #: bytes of all its files
    Column("used_at", UtcDateTime, nullable=False, index=True),
    CheckConstraint("size >= 0", name="size"),
)

checkpoint_files = Table(
    "checkpoint_files",
    metadata,
    Column("digest", ForeignKey("checkpoints.digest", ondelete="CASCADE"), primary_key=True),
    Column("path", String(512), primary_key=True),  #: relative to work/
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("step", Integer, nullable=False),
    Column("job_id", String(40), nullable=False),  #: the job whose attempt wrote it
)

#: The outputs of a source in storage, as the job `job_id` measured them. The digest says for what: see core/handoff/source_outputs.py.
source_figures = Table(
    "source_figures",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("tenant_id", String(64), nullable=False),
    Column("model_digest", String(80), nullable=False),
    # No foreign key: the outputs stay when the job is deleted.
    Column("job_id", String(40), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("outdated", Boolean, nullable=False),  #: a user wants the source to be measured anew
    Column("measured_at", UtcDateTime, nullable=False),
    Column("used_at", UtcDateTime, nullable=False, index=True),
    CheckConstraint("size >= 0", name="size"),
    Index("ix_source_figures_model", "tenant_id", "model_digest"),
)

job_artifacts = Table(
    "job_artifacts",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("format", String(40), nullable=False),
    Column("path", String(512), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("digest", String(80), nullable=False),
    Column("consumer", String(200), nullable=False),
    Column("files", JsonType, nullable=False),
    UniqueConstraint("job_id", "path"),
)

job_reports = Table(
    "job_reports",
    metadata,
    _job_id(),
    Column("report", JsonType, nullable=False),
    Column("files", JsonType, nullable=False),
)

job_metrics = Table(
    "job_metrics",
    metadata,
    _job_id(),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("subject", String(200), nullable=False),
    Column("name", String(100), nullable=False),
    Column("value", Float, nullable=False),
    Column("unit", String(40), nullable=False),
    Column("low", Float),
    Column("high", Float),
)

#: The result of a POST with an Idempotency-Key: a job, written in the same transaction, or the stored answer.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", String(64), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE")),
    Column("attempt_id", String(40)),  #: the request that has reserved the key
    Column("locked_until", UtcDateTime),
    Column("status", Integer),
    Column("headers", JsonType),
    Column("body", LargeBinary),  #: compressed; NULL if it held a secret
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("(job_id IS NULL) = (attempt_id IS NOT NULL)", name="one_kind"),
    Index("ix_idempotency_keys_created_at", "created_at"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("queue", String(8), nullable=False),
    Column("device", String(200), nullable=False),
    Column("memory", BigInteger, nullable=False),
    Column("gpu_memory", BigInteger),
    Column("gpu_memory_used", BigInteger),
    #: uuid, name, memory and bytes in use of each GPU that it offers; NULL: a worker of an earlier version, with one GPU
    Column("gpus", JsonType),
    #: [memory, count] of each kind of GPU: the most GPUs of the kind that one job can have
    Column("gpu_kinds", JsonType),
    Column("cpu_jobs", Integer, nullable=False, server_default=text("0")),  #: CPU jobs that it runs beside GPU jobs
    Column("threads", Integer, nullable=False),
    Column("version", String(40), nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("unfit", String(1000)),  #: the fault of its machine; while there is one, the worker claims no jobs
    Column("vllm", Boolean, nullable=False, server_default=false()),  #: whether its jobs also run artifacts in vLLM
    Column("started_at", UtcDateTime, nullable=False),
    Column("last_seen_at", UtcDateTime, nullable=False),
    Column("left_at", UtcDateTime),  #: when it stopped; plans also count workers that stopped lately
    CheckConstraint("queue IN ('cpu','gpu')", name="queue"),
)
