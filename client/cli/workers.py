"""`nightpress workers`: the worker processes and their states."""

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session


def add_to(app: typer.Typer) -> None:
    app.command("workers", rich_help_panel="Service")(takes_session(workers))


def workers(session: Session) -> None:
    """List the workers, with the job of each or the reason why it takes none."""
    with session.client() as client:
        found = client.workers()
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            worker.id,
            worker.host,
            worker.queue,
            worker.state,
            worker.device,
            output.size_text(worker.memory),
            worker.threads,
            worker.unfit or worker.job_id or "",
            output.ago_text(worker.last_seen_at),
        )
        for worker in found
    ]
    output.print_table(
        ("worker", "host", "queue", "state", "device", "memory", "threads", "job, or what is wrong", "seen"),
        rows,
        right=(5, 6),
    )
