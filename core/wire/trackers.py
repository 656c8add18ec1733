"""What trackers were told, on the wire."""

from nightpress.core.wire.base import View


class TrackedView(View):
    """A job's or study's run in a tracker."""

    tracker: str  #: "mlflow" or "trackio"
    run_id: str | None  #: the tracker's id of the run; None: not begun there yet
    page: str | None  #: address of the run's page
    up_to_date: bool
    attempts: int  #: failed attempts since the last success, and the one that runs
    error: str | None  #: why the last attempt failed
