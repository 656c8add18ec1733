"""`nightpress queues`: how much work waits and runs."""

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session


def add_to(app: typer.Typer) -> None:
    app.command("queues", rich_help_panel="Service")(takes_session(queues))


def queues(session: Session) -> None:
    """Count the jobs that wait and run in each queue, over all tenants."""
    with session.client() as client:
        found = client.queues()
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            queue.name,
            queue.queued,
            queue.running,
            f"{queue.queued_gpus} needed, {queue.running_gpus} held" if queue.name == "gpu" else "",
            output.duration_text(queue.oldest_queued_s or 0) if queue.queued else "",
        )
        for queue in found
    ]
    output.print_table(("queue", "queued", "running", "GPUs", "oldest waits"), rows, right=(1, 2, 3))
