"""The control process's work for studies: take in what has ended, ask for the next trials, measure the best again, write the report.

Any number of replicas may do this at the same time, and any may be killed at any moment: every step reads the rows and writes through
the ledger's guards.

A proposal depends on nothing but the study and the results of its first trials: trial n is made from the results of trials 0 to
n − window − 1, whichever others have ended by then. So the same seed and the same answers give the same trials, in whatever order trials
end, and the same winner.
"""

import logging
import time
from collections.abc import Callable, Sequence

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.jobs.service import JobService
from nightpress.core.service.jobs.store import JobStore
from nightpress.core.service.registry.models import ModelRegistry
from nightpress.core.service.studies.asking import Asking
from nightpress.core.service.studies.front import candidates_of
from nightpress.core.service.studies.ledger import StudyLedger
from nightpress.core.service.studies.outcomes import outcome_of
from nightpress.core.service.studies.records import Ended, NewTrial, Progress, Study, Trial
from nightpress.core.service.studies.reporting import make_report
from nightpress.core.service.studies.service import trial_recipe
from nightpress.core.wire.jobs import JobCreate
from nightpress.core.wire.studies import Reason

#: Seconds after which a step asks for no more trials: the next step goes on. Studies take turns, and a step stays short.
_ASKING_S = 0.07
_HOPELESS = 5  #: a search ends if so many first trials have failed and none had a result
#: Errors after which a trial can be asked for again later.
_PATIENT = {ErrorCode.QUOTA_EXCEEDED, ErrorCode.SOURCE_UNAVAILABLE}
#: Errors of a single recipe. After any other error that is not retryable, no trial of the study can run.
_OF_A_RECIPE = {ErrorCode.CANNOT_FIT, ErrorCode.INVALID_RECIPE, ErrorCode.UNSUPPORTED_ARCHITECTURE}

log = logging.getLogger(__name__)


class Searching:
    """Advances studies. `advance` may run twice, and in several processes at the same time."""

    def __init__(
        self, ledger: StudyLedger, jobs: JobService, runs: JobStore, models: ModelRegistry, ring: Callable[[str], None]
    ) -> None:
        self._ledger = ledger
        self._jobs = jobs
        self._runs = runs
        self._models = models
        self._ring = ring
        self._kept: dict[str, Asking] = {}  #: study → what was read of it; nothing that its rows don't say

    def advance(self) -> None:
        """Take a step with each study. A study that fails does not stop the others."""
        active = self._ledger.active()
        self._kept = {study.id: self._kept[study.id] for study in active if study.id in self._kept}
        for study in active:
            try:
                self._advance(study)
            except NightpressError as error:
                if error.kind.retryable:
                    raise
                log.warning("Study %s: %s", study.id, error)
                self._fail(study, error)
            except Exception:  # whatever is wrong with a study, the others must go on
                log.exception("Study %s: an unexpected error", study.id)
                fault = NightpressError(
                    ErrorCode.INTERNAL,
                    "The control process met an unexpected error in this study.",
                    hint="Its log has the traceback; please report it.",
                )
                self._fail(study, fault)

    def _fail(self, study: Study, error: NightpressError, reason: Reason | None = None) -> None:
        self._cancel(study, self._ledger.progress(study.id))
        self._ledger.fail(study, error.as_dict(), reason)

    def _advance(self, study: Study) -> None:
        for ended in self._ledger.ended(study.id):
            self._tell(study, ended)
        now = self._ledger.progress(study.id)
        match now.state:
            case "searching":
                self._search(study, now)
            case "judging":
                self._judge(study, now)
            case "cancelling":
                self._cancel(study, now)
                if now.first_open is None:
                    self._ledger.cancelled(study)

    def _asking(self, study: Study) -> Asking:
        """The study with all its trials, of which only those that are new or were open are read."""
        if study.id not in self._kept:
            self._kept[study.id] = Asking(study, self._models.header(study.model_id))
        asking = self._kept[study.id]
        asking.take(self._ledger.trials(study.id, start=asking.settled))
        return asking

    def _tell(self, study: Study, ended: Ended) -> None:
        report = self._runs.reader.report(ended.job_id) if ended.job_id and ended.job_state == "succeeded" else None
        outcome = outcome_of(ended.job_state, ended.error, report, study.gates, study.minimize)
        if self._ledger.tell(study.id, ended, outcome):
            log.info("Study %s: trial %d %s.", study.id, ended.number, outcome.state)

    def _cancel(self, study: Study, now: Progress) -> None:
        for job_id in now.open_jobs:
            self._runs.requests.request_cancel(study.tenant_id, job_id)

    # Searching -------------------------------------------------------------------------------------------------------

    def _search(self, study: Study, now: Progress) -> None:
        spent = _limit_reached(study, now)
        if spent is not None:
            self._cancel(study, now)
        elif now.proposed < study.max_trials:
            spent = self._ask(study, now)
        else:
            spent = "trials"
        if spent is None or now.first_open is not None:
            return
        hopeless = _why_hopeless(self._asking(study).trials, least=1)
        if hopeless is None:
            self._ledger.end_search(study, spent)
        else:
            self._fail(study, hopeless, "failures")

    def _ask(self, study: Study, now: Progress) -> Reason | None:
        """Begin trials while there is room. Returns the reason if the search has nothing more to try."""
        room = study.parallel - len(now.open_jobs)
        first_open = now.proposed if now.first_open is None else now.first_open
        until = time.monotonic() + _ASKING_S
        asking: Asking | None = None
        for number in range(now.proposed, min(now.proposed + room, study.max_trials)):
            known = known_to(study, number)
            if known > first_open or (asking is not None and time.monotonic() > until):
                return None
            if asking is None:
                asking = self._asking(study)
                if (hopeless := _why_hopeless(asking.trials, least=_HOPELESS)) is not None:
                    self._fail(study, hopeless, "failures")
                    return None
            trial = asking.next(number, known)
            if trial is None:
                return "space"
            if not self._begin(study, trial):
                return None
            asking.begun(trial)
        return None

    def _begin(self, study: Study, trial: NewTrial) -> bool:
        """Write a trial with its job. False: another replica was faster, or there is no room now."""
        name = f"{study.name or 'study'} · {'trial' if trial.role == 'search' else 'last measurement'} {trial.number}"
        wanted = JobCreate(
            model=study.model_id,
            recipe=trial.recipe,
            name=name[:200],
            priority=study.priority,
            labels=study.labels,
            promote=False,
        )
        try:
            new, max_queued = self._jobs.prepare(study.tenant_id, wanted, key_id=study.created_by)
            job = self._ledger.begin_trial(study, trial, new, max_queued=max_queued)
        except NightpressError as error:
            if error.code in _PATIENT:
                return False
            if error.code in _OF_A_RECIPE:
                return self._ledger.refuse_trial(study, trial, f"{error.code.value}: {error.message}")
            raise
        if job is None:
            return False
        if trial.role == "search":
            job = self._runs.requests.reuse(job)  # an identical trial of an earlier study
        if job.state == "queued":
            self._ring(job.queue)
        return True

    # Judging ---------------------------------------------------------------------------------------------------------

    def _judge(self, study: Study, now: Progress) -> None:
        """Measure the best trials again, on the other half of the data; then write the report."""
        trials = self._asking(study).trials
        judged = {trial.judges for trial in trials if trial.role == "judge"}
        number = now.proposed
        for candidate in candidates_of(trials, study.max_judged):
            if candidate.number in judged:
                continue
            recipe = trial_recipe(study.space, self._ledger.recipe(study.id, candidate.number), study.gates, "judge")
            judge = NewTrial(
                number=number,
                role="judge",
                judges=candidate.number,
                params=candidate.params,
                known=number,
                recipe=recipe.model_dump(mode="json"),
                digest=candidate.digest,
            )
            if not self._begin(study, judge):
                return
            number += 1
        if number > now.proposed or now.first_open is not None:
            return
        recipes = {
            trial.number: self._ledger.recipe(study.id, trial.number) for trial in trials if trial.role == "judge"
        }
        report, winner = make_report(study, trials, recipes, now.at)
        if self._ledger.succeed(study, report.model_dump(mode="json"), winner=winner):
            log.info("Study %s has ended: %s.", study.id, "accepted" if winner else "rejected")


def known_to(study: Study, number: int) -> int:
    """Return how many first trials a proposal is made from. Two rounds of trials may be open, so that a slow trial keeps no worker idle."""
    window = study.parallel if study.parallel == 1 else 2 * study.parallel
    return max(0, number - window)


def _limit_reached(study: Study, now: Progress) -> Reason | None:
    if now.overdue:
        return "deadline"
    if study.cpu_limit_s is not None and now.cpu_s >= study.cpu_limit_s:
        return "cpu"
    if study.cost_limit is not None and now.cost >= study.cost_limit:
        return "cost"
    return "gpu" if study.gpu_limit_s is not None and now.gpu_s >= study.gpu_limit_s else None


def _why_hopeless(trials: Sequence[Trial], *, least: int) -> NightpressError | None:
    """Return the error of a study in which no trial had a result, if at least so many have ended; else None."""
    ended = [trial for trial in trials if trial.state not in {"open", "cancelled"}]
    if any(trial.state in {"kept", "missed", "screened"} for trial in ended) or len(ended) < least:
        return None
    return NightpressError(
        ErrorCode.INTERNAL if ended[-1].state == "failed" else ErrorCode.CANNOT_FIT,
        f"None of the first {len(ended)} trials had a result. The last: {ended[-1].reason}",
        hint="The logs of the trials' jobs say more: `nightpress studies trials` lists them.",
    )
