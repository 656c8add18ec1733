"""`nightpress cost`: what a job has cost and what its artifacts save, and what a tenant spends."""

from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError
from nightpress.core.wire.costs import CostView, JobCostView, SpendingView


def add_to(app: typer.Typer) -> None:
    app.command("cost", rich_help_panel="Results")(takes_session(cost))


def cost(
    session: Session,
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A job's id; without one, your tenant's days.")
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=3660, help="Without a job: number of days.")] = 31,
    tenant: Annotated[
        str | None, typer.Option("--tenant", metavar="TENANT", help="Another tenant's days; administrators only.")
    ] = None,
) -> None:
    """Print what a job has cost and what its artifacts save per million tokens, or what your tenant has spent each day."""
    with session.client() as client:
        found = client.costs(days=days, tenant_id=tenant) if job is None else client.jobs.cost(job)
    if session.json:
        output.print_json(found)
        return
    if not found.currency:
        raise ClientError("The operator has set no prices.", hint="They are set with NIGHTPRESS_PRICES.")
    _print_job(found) if isinstance(found, JobCostView) else _print_days(found)


def _print_days(found: SpendingView) -> None:
    rows = [(day.day, f"{day.amount:,.4f}") for day in found.days]
    output.print_table(("day", found.currency), rows, right=(1,))
    total = sum(day.amount for day in found.days)
    output.say(f"{amount_text(total, found.currency)} in all.")


def _print_job(found: JobCostView) -> None:
    output.say(f"{found.job_id} cost {amount_text(found.amount, found.currency)}.")
    rows = [
        (entry.number, entry.device or entry.worker_id, output.duration_text(entry.seconds), f"{entry.amount:,.4f}")
        for entry in found.attempts
    ]
    output.print_table(("attempt", "on", "took", found.currency), rows, right=(0, 2, 3))
    _print_savings(found)


def _print_savings(found: JobCostView) -> None:
    if not found.savings:
        output.note("Nothing was timed in tokens on a device that has a price, so no saving is known.", "dim")
        return
    rows = [
        (
            saving.artifact,
            f"{saving.what}: {saving.shape}",
            f"{saving.source_per_million:,.4f}",
            f"{saving.per_million:,.4f}",
            f"{saving.saved_per_million:,.4f}",
            "never" if saving.pays_back_after is None else f"{saving.pays_back_after:,.0f} tokens",
        )
        for saving in found.savings
    ]
    output.say(f"\n{found.currency} for a million tokens:")
    output.print_table(
        ("artifact", "measured", "source", "artifact", "saved", "pays back after"), rows, right=(2, 3, 4, 5)
    )


def amount_text(amount: float, currency: str) -> str:
    """Money with as many digits as it needs: small amounts would otherwise be 0.00."""
    return f"{amount:,.2f} {currency}" if amount >= 1 or amount == 0 else f"{amount:.6f} {currency}"


def cost_text(cost: CostView | None) -> str:
    return "" if cost is None else amount_text(cost.amount, cost.currency)
