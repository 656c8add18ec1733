"""Opens the trackers that the settings name. Their libraries are an extra, which only the control process needs."""

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.trackers.tracker import Tracker
from nightpress.core.settings import Settings


def open_trackers(settings: Settings) -> list[tuple[Tracker, str]]:
    """Each tracker that is switched on, and its address. Raises NightpressError(invalid_request) if its library is missing."""
    if not settings.mlflow_url:
        return []
    try:
        from nightpress.core.service.trackers.mlflow import MlflowTracker
    except ImportError as error:
        raise NightpressError(
            ErrorCode.INVALID_REQUEST,
            f"NIGHTPRESS_MLFLOW_URL is set, but MLflow's client can't be imported: {error}.",
            hint="Install it where the control process runs: pip install 'nightpress[trackers]'.",
        ) from error
    return [(MlflowTracker(settings), settings.mlflow_url)]
