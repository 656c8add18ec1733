"""What both clients can do with studies."""

from collections.abc import Callable

from nightpress.client import study_calls
from nightpress.client.errors import ApiError, UnreachableError
from nightpress.client.events import STUDY_EVENTS
from nightpress.client.flows import Flow, Listing, Pause
from nightpress.client.methods import Driver, Resource, ask, flow, listing, pages
from nightpress.client.tailing import follow_lines, past_lines
from nightpress.client.waiting import Pace
from nightpress.core.wire.jobs import TERMINAL_STATES, EventView
from nightpress.core.wire.studies import StudyView


class Studies(Resource[Driver]):
    """Studies: searches for the best form of a model that keeps some gates. Their trials are jobs."""

    create = ask(study_calls.create_study)
    iterate = pages(study_calls.page_studies)
    get = ask(study_calls.get_study)
    cancel = ask(study_calls.cancel_study)
    trials = pages(study_calls.page_trials)
    report = ask(study_calls.get_study_report)
    trackers = ask(study_calls.list_study_trackers)

    @flow
    def wait(
        self,
        study_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 2.0,
        patience_s: float = 120.0,
        on_update: Callable[[StudyView], None] | None = None,
    ) -> Flow[StudyView]:
        """Return the study once it has succeeded, failed or been cancelled. `on_update` is called with each answer until then.

        Raises TimeoutError after `timeout_s`, while the study goes on. Raises UnreachableError or ApiError where the server
        has been away for more than `patience_s`.
        """
        pace = Pace(timeout_s, poll_s, patience_s)
        while True:
            try:
                study = yield from self._ask(study_calls.get_study(study_id))
            except (UnreachableError, ApiError) as error:
                pause = pace.after_error(error)
            else:
                if on_update:
                    on_update(study)
                if study.state in TERMINAL_STATES:
                    return study
                pause = pace.after("Study", study.id, study.state)
            yield Pause(pause)

    @listing
    def past_events(self, study_id: str, *, after: int = 0) -> Listing[EventView]:
        """A study's events up to now, from number `after` + 1 on."""
        yield from past_lines(self, STUDY_EVENTS, study_id, after)

    @listing
    def events(self, study_id: str, *, after: int = 0, patience_s: float = 120.0) -> Listing[EventView]:
        """A study's events as they come, until the study is over. A broken connection neither skips nor repeats an event.

        Raises UnreachableError or ApiError where the server has been away for more than `patience_s`.
        """
        yield from follow_lines(
            self, STUDY_EVENTS, study_id, after, patience_s, lambda: study_calls.get_study(study_id)
        )
