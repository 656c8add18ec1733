"""`nightpress workers`: the worker processes and their states."""

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.wire.system import WorkerView


def add_to(app: typer.Typer) -> None:
    app.command("workers", rich_help_panel="Service")(takes_session(workers))


def workers(session: Session) -> None:
    """List the workers, with their GPUs and jobs or the reason why they take none."""
    with session.client() as client:
        found = client.workers()
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            worker.id,
            worker.host,
            f"{worker.queue} + {worker.cpu_jobs} cpu" if worker.cpu_jobs else worker.queue,
            worker.state,
            worker.device,
            _gpus(worker),
            output.size_text(worker.memory),
            worker.threads,
            worker.unfit or ", ".join(worker.job_ids),
            output.ago_text(worker.last_seen_at),
        )
        for worker in found
    ]
    output.print_table(
        ("worker", "host", "queue", "state", "device", "GPUs", "memory", "threads", "jobs, or what is wrong", "seen"),
        rows,
        right=(6, 7),
    )


def _gpus(worker: WorkerView) -> str:
    """How many of its GPUs are free, and what each has of memory: `5 of 8 free, 80.0 GB`."""
    if not worker.gpus:
        return ""
    free = sum(not gpu.held for gpu in worker.gpus)
    sizes = dict.fromkeys(output.size_text(gpu.memory) for gpu in worker.gpus)
    return f"{free} of {len(worker.gpus)} free, {' and '.join(sizes)}"
