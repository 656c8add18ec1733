"""`nightpress tenants …`: tenants with their quotas and their use of them, for administrators."""

from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.cost import amount_text
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.numbers import whole_number
from nightpress.core.wire.access import QuotaChange, TenantView, UsageView

tenants = typer.Typer(
    invoke_without_command=True, help="Tenants, for administrators: list, show quotas and use, set quotas."
)

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT")]


def add_to(app: typer.Typer) -> None:
    app.add_typer(tenants, name="tenants", rich_help_panel="Access")


@tenants.callback()
@takes_session
def list_tenants(session: Session, context: typer.Context) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.tenants.iterate())
    if session.json:
        output.print_json(found)
        return
    rows = [
        (
            tenant.id,
            tenant.usage.queued_jobs,
            tenant.usage.running_jobs,
            output.size_text(tenant.usage.storage_bytes),
            output.duration_text(tenant.usage.gpu_seconds_month),
            _money(tenant.usage.cost_month, tenant.usage.currency),
        )
        for tenant in found
    ]
    output.print_table(
        ("tenant", "queued", "running", "stored", "GPU this month", "cost this month"), rows, right=(1, 2, 3, 4, 5)
    )


@tenants.command("show")
@takes_session
def show_tenant(session: Session, tenant: TenantArgument) -> None:
    """Print a tenant's quotas and how much of them it uses."""
    with session.client() as client:
        _print_tenant(session, client.tenants.get(tenant))


@tenants.command("quota")
@takes_session
def set_quota(
    session: Session,
    tenant: TenantArgument,
    quota: Annotated[
        list[str],
        typer.Argument(
            metavar="QUOTA=N…",
            help=f"{', '.join(QuotaChange.model_fields)}. 0: unlimited. Nothing after the =: the installation's default.",
        ),
    ],
) -> None:
    """Set a tenant's quotas, e.g. `max_running_jobs=2`. Quotas that are not named stay as they are."""
    wanted: dict[str, int | None] = {}
    for assignment in quota:
        name, equals, value = assignment.partition("=")
        bound = whole_number(value)
        if name not in QuotaChange.model_fields or not equals or (value and bound is None):
            raise typer.BadParameter(
                f"{assignment!r} is not QUOTA=N. Quotas: {', '.join(QuotaChange.model_fields)}.",
                param_hint="QUOTA=N",
            )
        wanted[name] = bound
    with session.client() as client:
        _print_tenant(session, client.tenants.set_quotas(tenant, **wanted))


def _print_tenant(session: Session, tenant: TenantView) -> None:
    if session.json:
        output.print_json(tenant)
        return
    output.say(f"tenant {tenant.id}")
    print_usage(tenant.quotas, tenant.usage)


def _money(amount: float, currency: str) -> str:
    return amount_text(amount, currency) if currency else ""


def print_usage(quotas: dict[str, int], usage: UsageView) -> None:
    """A table of quotas with how much of each is used."""
    used = {
        "max_queued_jobs": str(usage.queued_jobs),
        "max_running_jobs": str(usage.running_jobs),
        "max_storage_bytes": output.size_text(usage.storage_bytes),
        "max_gpu_seconds_month": output.duration_text(usage.gpu_seconds_month),
        "max_cost_day": _money(usage.cost_day, usage.currency),
        "max_cost_month": _money(usage.cost_month, usage.currency),
    }
    texts = {"max_storage_bytes": output.size_text, "max_gpu_seconds_month": output.duration_text}
    rows = [
        (name, used.get(name, ""), texts.get(name, "{:,.0f}".format)(bound) if bound else "no bound")
        for name, bound in quotas.items()
        if bound or usage.currency or not name.startswith("max_cost")
    ]
    output.print_table(("quota", "used", "of"), rows, right=(1, 2))
