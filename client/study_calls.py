"""The requests about studies as values, as in `client.calls`."""

from collections.abc import Mapping
from typing import Any

from nightpress.client.calls import Call, items_reader, path_of, post, query, reader
from nightpress.core.wire.base import Page
from nightpress.core.wire.jobs import EventView
from nightpress.core.wire.studies import StudyCreate, StudyReport, StudyView, TrialView
from nightpress.core.wire.trackers import TrackedView

_TRACKED = items_reader(TrackedView)
_STUDY, _STUDIES, _STUDY_REPORT = reader(StudyView), reader(Page[StudyView]), reader(StudyReport)
_TRIALS, _EVENTS = reader(Page[TrialView]), items_reader(EventView)
_PLANNING_S = 60.0  #: the server makes plans of many recipes before it answers


def create_study(model: str, gates: Mapping[str, str], *, minimize: str = "size", **fields: Any) -> Call[StudyView]:
    """Search the best form of a model by `minimize` (size, latency, decode or memory) among those that keep the gates.

    `fields`: further fields of core.wire.studies.StudyCreate (target, space, trials, parallel, hours, data, …).
    """
    request = StudyCreate.model_validate({"model": model, "gates": dict(gates), "minimize": minimize, **fields})
    return post("/v1/studies", _STUDY, request, timeout_s=_PLANNING_S)


def get_study(study_id: str) -> Call[StudyView]:
    return Call("GET", path_of("studies", study_id), _STUDY)


def page_studies(*, cursor: str | None = None, limit: int = 50) -> Call[Page[StudyView]]:
    return Call("GET", "/v1/studies", _STUDIES, params=query(cursor=cursor, limit=limit))


def cancel_study(study_id: str) -> Call[StudyView]:
    """Cancel a study and its trials. It is `cancelling` until the workers have stopped."""
    return post(path_of("studies", study_id, "cancel"), _STUDY)


def page_trials(study_id: str, *, cursor: str | None = None, limit: int = 50) -> Call[Page[TrialView]]:
    """A page of a study's trials, in the order in which they were proposed."""
    return Call("GET", path_of("studies", study_id, "trials"), _TRIALS, params=query(cursor=cursor, limit=limit))


def get_study_report(study_id: str) -> Call[StudyReport]:
    """What a study found. Raises ApiError(not_found) before the study has succeeded."""
    return Call("GET", path_of("studies", study_id, "report"), _STUDY_REPORT)


def list_study_trackers(study_id: str) -> Call[list[TrackedView]]:
    """A study's runs in trackers, e.g. MLflow."""
    return Call("GET", path_of("studies", study_id, "trackers"), _TRACKED)


def list_study_events(study_id: str, *, after: int = 0, limit: int = 500) -> Call[list[EventView]]:
    """A study's events from number `after` + 1 on, oldest first."""
    return Call("GET", path_of("studies", study_id, "events"), _EVENTS, params=query(after=after, limit=limit))
