"""Opens the trackers that the settings name. MLflow's library is an extra, which only the control process needs."""

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.trackers.tracker import Tracker
from nightpress.core.settings import Settings


def open_trackers(settings: Settings) -> list[tuple[Tracker, str]]:
    """Each tracker that is switched on, and its address. Raises NightpressError(invalid_request) if its library is missing."""
    opened: list[tuple[Tracker, str]] = []
    if settings.mlflow_url:
        opened.append((_mlflow(settings), settings.mlflow_url))
    if settings.trackio_url:
        # It imports httpx, which takes 0.1 s; without trackers the control process starts without it.
        from nightpress.core.service.trackers.trackio import TrackioTracker

        opened.append((TrackioTracker(settings), settings.trackio_url))
    return opened


def _mlflow(settings: Settings) -> Tracker:
    try:
        from nightpress.core.service.trackers.mlflow import MlflowTracker
    except ImportError as error:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"NIGHTPRESS_MLFLOW_URL is set, but MLflow's client can't be imported: {error}.",
            hint="Install it where the control process runs: pip install 'nightpress[trackers]'.",
        ) from error
    return MlflowTracker(settings)
