"""The states of a job, and the table of transitions. Pure data: the store builds the guards of its statements from it."""

from enum import StrEnum
from typing import Final, Literal

from nightpress.core.wire.jobs import TERMINAL_STATES, JobState

QUEUED: Final = "queued"
RUNNING: Final = "running"
CANCELLING: Final = "cancelling"
SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

ALL_STATES: Final[tuple[JobState, ...]] = (QUEUED, RUNNING, CANCELLING, SUCCEEDED, FAILED, CANCELLED)
#: the only states in which a worker holds a lease
LEASED_STATES: Final[frozenset[JobState]] = frozenset({RUNNING, CANCELLING})

AttemptOutcome = Literal["succeeded", "failed", "cancelled", "released", "lost"]


class Trigger(StrEnum):
    """What can happen to a job."""

    CLAIM = "claim"
    RENEW = "renew"
    FINISH = "finish"
    FAIL = "fail"
    RELEASE = "release"  #: the worker drains, or its machine has a fault
    CANCEL = "cancel"  #: requested by a user
    CONFIRM_CANCELLED = "confirm_cancelled"  #: the worker has killed the child
    LEASE_EXPIRED = "lease_expired"
    STALLED = "stalled"
    RUN_DEADLINE = "run_deadline"
    QUEUE_DEADLINE = "queue_deadline"
    REUSE = "reuse"  #: an identical job has already succeeded


#: trigger → state before → possible states after. A pair that is not listed changes nothing. No transition leaves a terminal state.
TRANSITIONS: Final[dict[Trigger, dict[JobState, frozenset[JobState]]]] = {
    Trigger.CLAIM: {QUEUED: frozenset({RUNNING})},
    Trigger.RENEW: {RUNNING: frozenset({RUNNING}), CANCELLING: frozenset({CANCELLING})},
    Trigger.FINISH: {RUNNING: frozenset({SUCCEEDED}), CANCELLING: frozenset({SUCCEEDED})},
    Trigger.FAIL: {RUNNING: frozenset({QUEUED, FAILED}), CANCELLING: frozenset({CANCELLED, FAILED})},
    Trigger.RELEASE: {RUNNING: frozenset({QUEUED}), CANCELLING: frozenset({CANCELLED})},
    Trigger.CANCEL: {QUEUED: frozenset({CANCELLED}), RUNNING: frozenset({CANCELLING})},
    Trigger.CONFIRM_CANCELLED: {CANCELLING: frozenset({CANCELLED})},
    Trigger.LEASE_EXPIRED: {RUNNING: frozenset({QUEUED, FAILED}), CANCELLING: frozenset({CANCELLED})},
    Trigger.STALLED: {RUNNING: frozenset({QUEUED, FAILED}), CANCELLING: frozenset({CANCELLED})},
    Trigger.RUN_DEADLINE: {RUNNING: frozenset({FAILED}), CANCELLING: frozenset({CANCELLED})},
    Trigger.QUEUE_DEADLINE: {QUEUED: frozenset({FAILED})},
    Trigger.REUSE: {QUEUED: frozenset({SUCCEEDED})},
}


def sources(trigger: Trigger) -> tuple[JobState, ...]:
    """The states in which a trigger has an effect, in a fixed order."""
    return tuple(state for state in ALL_STATES if state in TRANSITIONS[trigger])


def is_terminal(state: JobState) -> bool:
    return state in TERMINAL_STATES
