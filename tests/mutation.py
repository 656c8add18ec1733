"""`python -m tests.mutation`: remove each guard of the code in turn, and check that at least one test fails.

A mutant is a copy of the project with one change. If no test fails without a guard, a later change could remove the guard unnoticed.
The exit status is 1 if a mutant survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRANSITIONS, ATTEMPTS, REQUESTS, EXPIRY, CLAIMS, SUBMISSION = (
    f"core/service/jobs/{name}.py"
    for name in ("transitions", "attempts", "requests", "expiry", "claim_statements", "submission")
)
CHECKPOINTS, SERVICE = "core/service/jobs/checkpoints.py", "core/service/jobs/service.py"
STATES, SCHEDULES, REGISTRY = (
    "core/service/jobs/states.py",
    "core/service/schedules/store.py",
    "core/service/registry/registry.py",
)
_TRANSITIONS, _EXPIRY, _CLAIMS = (
    f"tests/integration/test_store_{name}.py" for name in ("transitions", "expiry", "claims")
)
_API, _ACCESS = "tests/integration/test_api_jobs.py", "tests/integration/test_access.py"
_REGISTRY, _UPLOADS, _SOURCES, _INTAKE = (
    f"tests/integration/test_{name}.py" for name in ("registry", "registry_uploads", "sources", "intake")
)
_SKEWED = "tests/integration/test_skewed_clocks.py"
PROMOTIONS = "core/service/promotions/store.py"
SESSIONS, SIGN_IN, TOKENS = (f"core/service/access/oidc/{name}.py" for name in ("sessions", "sign_in", "tokens"))
QUOTAS = "core/service/access/quotas.py"
_SIGN_IN, _ATTACKS = "tests/integration/test_sign_in.py", "tests/security/test_sign_in.py"
_COSTS = "tests/integration/test_costs.py"
HOSTS, _HOSTS = "core/service/jobs/host_claims.py", "tests/integration/test_host_claims.py"
_HANGS = "tests/faults/test_f06_storage.py::test_f6_"
#: source file → the tests that must fail for its mutants; if all of them pass, the mutant has survived
TESTS = {
    **dict.fromkeys(
        (TRANSITIONS, ATTEMPTS, REQUESTS, EXPIRY),
        (_TRANSITIONS, _EXPIRY, _CLAIMS, "tests/integration/test_store_reads.py"),
    ),
    CLAIMS: (_CLAIMS, _TRANSITIONS, _EXPIRY),
    HOSTS: (_HOSTS,),
    SUBMISSION: ("tests/integration/test_store_submissions.py",),
    CHECKPOINTS: ("tests/integration/test_checkpoint_index.py",),
    SERVICE: (_API,),
    STATES: ("tests/unit/test_states.py",),
    SCHEDULES: ("tests/integration/test_schedules.py",),
    REGISTRY: (_REGISTRY, _UPLOADS, _SOURCES, _INTAKE),
}


@dataclass(frozen=True)
class Mutant:
    """A change: `old`, which occurs exactly once in `path`, becomes `new`."""

    guard: str  #: the removed guard, as DESIGN's table of transitions names it
    path: str
    old: str
    new: str
    tests: tuple[str, ...] = ()  #: replaces the file's entry in TESTS


MUTANTS = (
    Mutant("claim: only a queued job", CLAIMS, "_IN_QUEUE = (IS_QUEUED, ", "_IN_QUEUE = (IS_QUEUED | IS_LEASED, "),
    Mutant("claim: not before run_after", CLAIMS, "    _columns.run_after <= db_now(),\n", ""),
    Mutant("claim: it fits the worker's memory", CLAIMS, '_columns.needs_memory <= bindparam("offered_memory", type_=BigInteger)', '_columns.needs_memory != bindparam("offered_memory", type_=BigInteger)'),
    Mutant("claim: of the worker's own queue", CLAIMS, '_columns.queue == bindparam("offered_queue", type_=String)', '_columns.queue != bindparam("offered_queue", type_=String) + "x"'),
    Mutant("claim: a fresh attempt number", CLAIMS, '_columns.attempt + literal_column("1")', '_columns.attempt + literal_column("0")'),
    Mutant("claim: the tenant with the fewest running first", CLAIMS, "(candidate.c.priority.desc(), running, *by_age)", "(candidate.c.priority.desc(), *by_age)"),
    Mutant("claim: the highest priority first", CLAIMS, "(candidate.c.priority.desc(), running, *by_age)", "(running, *by_age)"),
    Mutant("claim: now and then the oldest, whatever its priority", CLAIMS, "*by_age if oldest else (", "*by_age if False else ("),
    Mutant("claim: the oldest of every priority is seen", CLAIMS, "tenants = _waiting_levels() if oldest else _waiting_tenants()\n    of_them = [_columns.tenant_id == tenants.c.id]\n    if oldest:", "tenants = _waiting_tenants()\n    of_them = [_columns.tenant_id == tenants.c.id]\n    if False:"),
    Mutant("claim: a tenant's bound on running jobs", CLAIMS, "running < most_running", "running < most_running + 1000", (_ACCESS,)),
    Mutant("claim: a tenant's bound on GPU time", CLAIMS, '< most_gpu,\n', '< most_gpu + 10**9,\n', (_ACCESS,)),
    Mutant("host: a GPU that an attempt holds is not free", HOSTS, "if gpu.uuid not in held)", "if gpu.uuid not in in_use)"),
    Mutant("host: memory that an attempt holds is not free", HOSTS, "memory -= row.memory_limit or row.needs_memory", "memory -= 0"),
    Mutant("host: no two instances of divided GPUs for one job", HOSTS, "return len(gpus) if all(gpu.whole for gpu in gpus) else 1", "return len(gpus)"),
    Mutant("host: enough GPUs are free", CLAIMS, 'return (*free, _on_some_kind(kinds, "free_gpus"), ', 'return (*free, _on_some_kind(kinds, "host_gpus"), ', (_HOSTS,)),
    Mutant("hold: what is younger waits", CLAIMS, "no_younger if oldest else before)", "no_younger | ~no_younger)", (_HOSTS,)),
    Mutant("hold: only one host for a job", CLAIMS, "of_nobody_else = or_(_columns", "of_nobody_else = or_(IS_QUEUED, _columns", (_HOSTS,)),
    Mutant("hold: until the job has started", CLAIMS, "or_(not_(fits_now), mine)", "not_(fits_now)", (_HOSTS,)),
    Mutant("claim: a lease of its own", CLAIMS, '"lease_id": bindparam("new_lease", type_=String)', '"lease_id": literal_column("\'lease_one\'")'),
    Mutant("the table: nothing leads out of an end", STATES, "Trigger.REUSE: {QUEUED: frozenset({SUCCEEDED})}", "Trigger.REUSE: {QUEUED: frozenset({SUCCEEDED}), FAILED: frozenset({SUCCEEDED})}"),
    Mutant("the table: only a cancelling job is confirmed cancelled", STATES, "Trigger.CONFIRM_CANCELLED: {CANCELLING: frozenset({CANCELLED})}", "Trigger.CONFIRM_CANCELLED: {RUNNING: frozenset({CANCELLED}), CANCELLING: frozenset({CANCELLED})}"),
    Mutant("every worker's statement: the lease", TRANSITIONS, "_columns.lease_id == lease.lease_id, ", ""),
    Mutant("every transition: the states it starts from", TRANSITIONS, "        .where(*guards, in_source)\n", "            .where(*guards)\n"),
    Mutant("every transition: an event without a gap", TRANSITIONS, ".values(event_seq=_columns.event_seq + 1, **values)", ".values(event_seq=_columns.event_seq + 2, **values)"),
    Mutant("renew: progress never falls", ATTEMPTS, '"progress": case((_columns.progress < progress.fraction, progress.fraction), else_=_columns.progress)', '"progress": progress.fraction'),
    Mutant("renew: a sign of life is no progress", ATTEMPTS, '"progressed_at": case((moved, db_now()), else_=_columns.progressed_at)', '"progressed_at": db_now()'),
    Mutant("finish: the manifest is this attempt's", ATTEMPTS, "if (manifest.job_id, manifest.attempt) != (lease.job_id, lease.attempt):", "if False:"),
    Mutant("fail: no more failures than allowed", TRANSITIONS, "_columns.failures + 1 >= _columns.max_failures", "_columns.failures + 1 > _columns.max_failures"),
    Mutant("fail: an error that will not pass is final", TRANSITIONS, 'else literal_column("1 = 1")', 'else literal_column("1 = 0")'),
    Mutant("fail: a pause before the next attempt", TRANSITIONS, "run_after=case((state == QUEUED, _backed_off(backoff_s)), else_=_columns.run_after)", "run_after=_columns.run_after"),
    Mutant("fail: a cancelling job never goes back to the queue", TRANSITIONS, "state = case((_columns.state == CANCELLING, when_cancelling), (used_up, FAILED), else_=QUEUED)", "state = case((used_up, FAILED), else_=QUEUED)"),
    Mutant("release: a cancelling job ends", ATTEMPTS, "state=case((_columns.state == CANCELLING, CANCELLED), else_=QUEUED)", "state=QUEUED"),
    Mutant("cancel: a person's own job alone", REQUESTS, "                _columns.id == job_id,\n                _columns.tenant_id == tenant_id,\n", "                _columns.id == job_id,\n"),
    Mutant("expire: only a lease that ran out", EXPIRY, "_columns.lease_expires_at < db_now(), lost", "_columns.lease_expires_at < db_now(10**6), lost"),
    Mutant("expire: still due when it is taken", EXPIRY, "                [_columns.id == job_id, IS_LEASED, is_due],\n", "                [_columns.id == job_id, IS_LEASED],\n"),
    Mutant("expire: only a run past its limit", EXPIRY, "_columns.started_at < db_now(-SUPERVISOR_GRACE_S - _columns.run_limit_s)", "_columns.started_at < db_now()"),
    Mutant("expire: only a run that stalls", EXPIRY, "_columns.progressed_at < db_now(-SUPERVISOR_GRACE_S - _columns.stall_s)", "_columns.progressed_at < db_now()"),
    Mutant("queue deadline: still due when it is passed", EXPIRY, "                    _columns.id == job_id,\n                    is_due,\n", "                    _columns.id == job_id,\n"),
    Mutant("logs: a job's share and no more", ATTEMPTS, "                if seq <= MAX_LOG_LINES\n", ""),
    Mutant("end: the attempt is closed", ATTEMPTS, '            close_attempt(connection, job, "succeeded")\n', ""),
    Mutant("end: only an accepted result is handed on", ATTEMPTS, '            if outcome.verdict == "accepted":\n', "            if True:\n", (_ACCESS,)),
    Mutant("release: no failure is counted", ATTEMPTS, "                run_after=db_now(),\n                **RESTING", "                run_after=db_now(),\n                failures=_columns.failures + 1,\n                **RESTING"),
    Mutant("fail: a failure is counted", TRANSITIONS, "else_=_columns.failures + 1),", "else_=_columns.failures),"),
    Mutant("end: nobody holds it any more", TRANSITIONS, '    "lease_id": null(),\n', ""),
    Mutant("reuse: an identical job's result alone", REQUESTS, "made.c.fingerprint == job.fingerprint)", "made.c.fingerprint.is_not(None))", (_API,)),
    Mutant("reuse: within the tenant alone", REQUESTS, ".where(made.c.tenant_id == job.tenant_id, ", ".where(", (_API,)),
    Mutant("reuse: what the same engine made", REQUESTS, "            .where(made.c.engine == engine)", "            .where(True)"),
    Mutant("reuse: never by force", SERVICE, "wanted.reuse and not wanted.force", "wanted.reuse"),
    Mutant("submit: the quota", SUBMISSION, 'if queued >= values["max_queued"]:', "if False:"),
    Mutant("submit: the job's own fingerprint", SUBMISSION, '"idempotency_fingerprint": idempotency.fingerprint}', '"idempotency_fingerprint": idempotency.fingerprint, "fingerprint": idempotency.fingerprint}', ("tests/integration/test_columns_of_jobs.py", "tests/integration/test_columns_of_submissions.py")),
    Mutant("end: the newest of all lines is the latest", PROMOTIONS, "_columns.created_at.desc(), _columns.id.desc()", "_columns.id.desc()", (_SKEWED,)),
    Mutant("submit: the key's own body", SUBMISSION, "if row[0] != idempotency.fingerprint or row[1] is None:", "if row[1] is None:"),
    Mutant("fire: recorded once", SCHEDULES, "(schedules.c.id == due.id, schedules.c.next_at == due.next_at)", "(schedules.c.id == due.id,)"),
    Mutant("fire: decided once", SCHEDULES, '_runs.state == "pending")\n            won', '_runs.state != "x")\n            won'),
    Mutant("model: not deleted while a job needs it", REGISTRY, "self._check_not_needed(connection, row)", "pass"),
    Mutant("model: decided once, from the state in which it was read", REGISTRY, "table.c.id == row.id, *same, table", "table.c.id == row.id, table"),
    Mutant("deletion: done again when nobody stores any more", REGISTRY, "UNSWEPT, over_at < db_now(-older_than_s)", "UNSWEPT", ("tests/faults/test_deletions.py",)),
    Mutant("store: one that hangs holds up no cancellation", "worker/storage_threads.py", "while not wait([done], timeout=_LOOK_S).done:", "while False:", (f"{_HANGS}f20_f21_a_store_that_hangs_holds_up_neither_a_cancellation_nor_a_deploy",)),
    Mutant("store: one that hangs holds up no deploy", "worker/app.py", "if supervisor.storage_threads.hangs():", "if False:", (f"{_HANGS}f20_f21_a_store_that_hangs_holds_up_neither_a_cancellation_nor_a_deploy",)),
    Mutant("store: one that hangs holds up no lease", "worker/control.py", 'self._slow.start(slow.__name__.strip("_"), slow)', "slow()", (f"{_HANGS}a_store_that_hangs_holds_up_no_lease",)),
    Mutant("checkpoint: one writer a prefix", CHECKPOINTS, ", where=~_held(checkpoints.c.lease_id))", ")"),
    Mutant("checkpoint: the prefix is the writer's, whose lease stands", CHECKPOINTS, "(checkpoints.c.digest == digest, _held(lease.lease_id))", "(checkpoints.c.digest == digest,)"),
    Mutant("checkpoint: its bound", CHECKPOINTS, ".where(*mine, size <= limit)", ".where(*mine)"),
    Mutant("checkpoint: kept while its job lives", CHECKPOINTS, "db_now(-older_than_s), ~job_lives)", "db_now(-older_than_s))"),
    Mutant("checkpoint: kept if taken up again", CHECKPOINTS, ".where(checkpoints.c.digest == digest, unused))", ".where(checkpoints.c.digest == digest))"),
    Mutant("session: ends unused", SESSIONS, "            _columns.seen_at > db_now(-self._idle_s),\n", "", (_SIGN_IN,)),
    Mutant("session: ends in any case", SESSIONS, "            _columns.ends_at > db_now(),\n", "", (_SIGN_IN,)),
    Mutant("session: ends unconfirmed", SESSIONS, "            _columns.confirmed_at > db_now(-(self._recheck_s + UNCONFIRMED_S)),\n", "", (_SIGN_IN,)),
    Mutant("session: changes only for its own page", "api/browser.py", "if not hmac.compare_digest(given", "if False and (given", (_ATTACKS,)),
    Mutant("sign-in: finished by the browser that began it", SIGN_IN, 'if not hmac.compare_digest(answer.get("state"', 'if False and (answer.get("state"', (_ATTACKS,)),
    Mutant("sign-in: by the provider that was asked", SIGN_IN, "if told != self.provider.issuer and", "if False and", (_ATTACKS,)),
    Mutant("token: of this sign-in", TOKENS, "if nonce is not None and", "if False and", (_ATTACKS,)),
    Mutant("token: of this client", TOKENS, 'if claims.get("azp", self._page) != self._page:', "if False:", (_ATTACKS,)),
    Mutant("token: of a type that names a person", TOKENS, 'if str(header.get("typ", "")).lower() not in _TYPES:', "if False:", (_ATTACKS,)),
    Mutant("budget: bounds submissions", QUOTAS, "if bound and used >= bound * MICROS:", "if False:", (_COSTS,)),
    Mutant("budget: holds back queued jobs", CLAIMS, "return or_(most == zero, func", "return or_(zero == zero, func", (_COSTS,)),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("words", nargs="*", help="only guards that contain one of these words")
    words = parser.parse_args().words
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.guard for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory(prefix="nightpress-mutants-") as scratch:
        copy = Path(scratch) / "project"
        for name in ("api", "client", "core", "docs", "migrations", "tests", "worker"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(
            ROOT / "nightpress", copy / "nightpress", symlinks=True
        )  # its links lead to the copies beside it
        shutil.copy(ROOT / "pyproject.toml", copy)
        for mutant in chosen:
            began = time.monotonic()
            killer = _first_red_test(copy, mutant)
            verdict = "killed" if killer else "SURVIVED"
            print(f"{verdict:9} {mutant.guard:52} {time.monotonic() - began:5.1f} s  {killer}", flush=True)  # noqa: T201
            if not killer:
                survivors.append(mutant.guard)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} guards are held by a test.")  # noqa: T201
    return 1 if survivors else 0


def _first_red_test(copy: Path, mutant: Mutant) -> str:
    path = copy / mutant.path
    whole = path.read_text()
    if whole.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.guard}: {mutant.path} has {whole.count(mutant.old)} times {mutant.old!r}: mend tests/mutation.py"
        )
    path.write_text(whole.replace(mutant.old, mutant.new))
    tests = mutant.tests or TESTS[mutant.path]
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not postgresql", *tests]
        env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=600)
    finally:
        path.write_text(whole)
    if ran.returncode not in {0, 1}:
        raise SystemExit(f"{mutant.guard}: the tests did not run:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    red = [line.split()[1] for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return red[0].rpartition("::")[2] if red else ""


if __name__ == "__main__":
    sys.exit(main())
