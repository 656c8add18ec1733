"""What `models add` and `datasets add` share: a name from a source's address, progress while the server fetches, and the result."""

from collections.abc import Callable, Sequence

from nightpress.client.cli import output
from nightpress.client.cli.session import Session
from nightpress.client.errors import ClientError
from nightpress.core.recipes.models import plain_name
from nightpress.core.wire.models import DataSetView, ModelView


def name_of_source(source: str) -> str:
    """The last part of an `s3://…` or `hf://…` address, without revision, query and file endings."""
    return plain_name(source.partition("?")[0].rstrip("/").rpartition("/")[2].partition("@")[0].partition(".")[0])


def progress_notes(session: Session) -> Callable[[ModelView | DataSetView], None]:
    """A callback for `wait` that prints each new tenth of what the server fetches or verifies."""
    last_tenth = -1

    def note(view: ModelView | DataSetView) -> None:
        nonlocal last_tenth
        tenth = int((view.progress or 0) * 10)
        if view.state in {"fetching", "verifying"} and tenth > last_tenth and not session.json:
            last_tenth = tenth
            output.note(f"{view.state} {tenth * 10}%", "dim")

    return note


def print_registered(session: Session, view: ModelView | DataSetView) -> None:
    """Print a model or data set that has been added. Raises ClientError where the server failed to fetch or verify it."""
    if view.state == "failed":
        error = view.error or {}
        raise ClientError(f"{view.name}: {error.get('message', 'it failed')}", hint=str(error.get("hint", "")))
    if session.json:
        output.print_json(view)
        return
    output.say(f"{view.id}  {output.clean(view.name)}  {view.state}")
    if isinstance(view, ModelView) and view.left_out:
        output.note(left_out_text(view.left_out), "dim")


def left_out_text(names: Sequence[str]) -> str:
    """A sentence that names what lies beside a model and is not needed."""
    return f"Not needed, and left where it is: {output.clean(', '.join(names))}."
