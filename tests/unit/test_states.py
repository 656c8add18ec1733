"""The table of transitions, compared with the rules in DESIGN."""

import pytest

from nightpress.core.service.jobs.states import ALL_STATES, LEASED_STATES, TRANSITIONS, Trigger, is_terminal, sources
from nightpress.core.wire.jobs import TERMINAL_STATES


def test_the_table_is_the_one_that_was_designed():
    """Writes the table out a second time: the store and its tests both read the table, so only this test can notice an error in it."""
    taken_away = {"running": {"queued", "failed"}, "cancelling": {"cancelled"}}
    assert {
        "claim": {"queued": {"running"}},
        "renew": {"running": {"running"}, "cancelling": {"cancelling"}},
        "finish": {"running": {"succeeded"}, "cancelling": {"succeeded"}},
        "fail": {"running": {"queued", "failed"}, "cancelling": {"cancelled", "failed"}},
        "release": {"running": {"queued"}, "cancelling": {"cancelled"}},
        "cancel": {"queued": {"cancelled"}, "running": {"cancelling"}},
        "confirm_cancelled": {"cancelling": {"cancelled"}},
        "lease_expired": taken_away,
        "stalled": taken_away,
        "run_deadline": {"running": {"failed"}, "cancelling": {"cancelled"}},
        "queue_deadline": {"queued": {"failed"}},
        "reuse": {"queued": {"succeeded"}},
    } == TRANSITIONS


def test_nothing_leads_out_of_a_terminal_state():
    for table in TRANSITIONS.values():
        assert not TERMINAL_STATES & set(table)


def test_every_state_can_be_reached_from_queued():
    reached = {"queued"}
    while True:
        further = {
            to for table in TRANSITIONS.values() for start, ends in table.items() if start in reached for to in ends
        }
        if further <= reached:
            break
        reached |= further
    assert reached == set(ALL_STATES)


def test_every_state_that_is_not_terminal_can_end():
    for state in ALL_STATES:
        if not is_terminal(state):
            assert any(TERMINAL_STATES & table[state] for table in TRANSITIONS.values() if state in table)


def test_only_a_claim_leads_into_a_lease():
    for trigger, table in TRANSITIONS.items():
        for start, ends in table.items():
            if start not in LEASED_STATES and ends & LEASED_STATES:
                assert trigger is Trigger.CLAIM


def test_a_cancelling_job_never_goes_back_to_the_queue():
    for table in TRANSITIONS.values():
        assert table.get("cancelling", frozenset()) <= {"cancelling", "cancelled", "succeeded", "failed"}


@pytest.mark.parametrize("trigger", Trigger)
def test_sources_are_the_states_of_the_table(trigger: Trigger):
    assert set(sources(trigger)) == set(TRANSITIONS[trigger])
