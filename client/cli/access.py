"""Subcommands about who may do what: whoami, keys, tenants, audit."""

from itertools import islice
from typing import Annotated

import typer

from nightpress.client.cli import output
from nightpress.client.cli.session import Session, takes_session
from nightpress.core.numbers import whole_number
from nightpress.core.wire.access import KeyView, NewKeyView, QuotaChange, TenantView, UsageView

keys = typer.Typer(invoke_without_command=True, help="API keys: list, add, show, rotate, revoke.")
tenants = typer.Typer(
    invoke_without_command=True, help="Tenants, for administrators: list, show with quotas and use, set quotas."
)

Key = Annotated[str, typer.Argument(metavar="KEY", help="Its id, as `nightpress keys` lists it.")]
OfTenant = Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="Of another tenant: administrators.")]
Tenant = Annotated[str, typer.Argument(metavar="TENANT")]


def add_to(app: typer.Typer) -> None:
    app.command("whoami", rich_help_panel="Access")(takes_session(whoami))
    app.add_typer(keys, name="keys", rich_help_panel="Access")
    app.add_typer(tenants, name="tenants", rich_help_panel="Access")
    app.command("audit", rich_help_panel="Access")(takes_session(audit))


def whoami(session: Session) -> None:
    """Whose key it is, what it may do, and what its tenant uses of its quotas."""
    with session.client() as client:
        me = client.me()
        if session.json:
            output.print_json(me)
            return
        output.print_fields(
            [
                ("server", client.options.api_url),
                ("tenant", me.tenant_id),
                ("key", me.key_id),
                ("scopes", ", ".join(me.scopes)),
            ]
        )
    if me.usage is not None:
        _print_use(me.quotas, me.usage)


@keys.callback()
@takes_session
def list_keys(session: Session, context: typer.Context, tenant: OfTenant = None) -> None:
    if context.invoked_subcommand:
        return
    with session.client() as client:
        found = list(client.keys.iterate(tenant_id=tenant))
    if session.json:
        output.print_json(found)
        return
    rows = [(one.id, one.name, ", ".join(one.scopes), _state(one), output.ago_text(one.last_used_at)) for one in found]
    output.print_table(("key", "name", "scopes", "state", "used"), rows)


@keys.command("add")
@takes_session
def add_key(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    scope: Annotated[
        list[str], typer.Option("--scope", "-s", metavar="SCOPE", help="E.g. jobs:read; may be repeated.")
    ],
    days: Annotated[float | None, typer.Option(min=0.001, help="It expires after so many days.")] = None,
    tenant: OfTenant = None,
) -> None:
    """Make a key and print it, this once. It can do no more than your own."""
    seconds = None if days is None else days * 24 * 3600
    with session.client() as client:
        _print_new(session, client.keys.create(name, scope, expires_in_s=seconds, tenant_id=tenant))


@keys.command("show")
@takes_session
def show_key(session: Session, key: Key) -> None:
    """One key, without its secret."""
    with session.client() as client:
        _print_key(session, client.keys.get(key))


@keys.command("rotate")
@takes_session
def rotate_key(
    session: Session,
    key: Key,
    overlap: Annotated[float, typer.Option(min=0, help="Seconds for which the old one works on.")] = 3600.0,
) -> None:
    """Make a key's successor, with the same rights, and print it, this once."""
    with session.client() as client:
        _print_new(session, client.keys.rotate(key, overlap_s=overlap))


@keys.command("rm")
@takes_session
def revoke_key(session: Session, key: Key) -> None:
    """Revoke a key. It stops working within five seconds, for good."""
    with session.client() as client:
        client.keys.revoke(key)
    output.print_json({"revoked": key}) if session.json else output.say(f"{key} is revoked.")


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
            one.id,
            one.usage.queued_jobs,
            one.usage.running_jobs,
            output.size_text(one.usage.storage_bytes),
            output.duration_text(one.usage.gpu_seconds_month),
        )
        for one in found
    ]
    output.print_table(("tenant", "queued", "running", "stored", "GPU this month"), rows, right=(1, 2, 3, 4))


@tenants.command("show")
@takes_session
def show_tenant(session: Session, tenant: Tenant) -> None:
    """A tenant's quotas and what it uses of them."""
    with session.client() as client:
        _print_tenant(session, client.tenants.get(tenant))


@tenants.command("quota")
@takes_session
def set_quota(
    session: Session,
    tenant: Tenant,
    quota: Annotated[
        list[str],
        typer.Argument(
            metavar="QUOTA=N…",
            help=f"{', '.join(QuotaChange.model_fields)}. 0: no bound; empty: the installation's own.",
        ),
    ],
) -> None:
    """Set a tenant's quotas, e.g. `max_running_jobs=2`. The rest stays."""
    wanted: dict[str, int | None] = {}
    for one in quota:
        name, given, value = one.partition("=")
        bound = whole_number(value)
        if name not in QuotaChange.model_fields or not given or (value and bound is None):
            raise typer.BadParameter(
                f"{one!r} is not QUOTA=N. Quotas: {', '.join(QuotaChange.model_fields)}.", param_hint="QUOTA=N"
            )
        wanted[name] = bound
    with session.client() as client:
        _print_tenant(session, client.tenants.set_quotas(tenant, **wanted))


def audit(
    session: Session,
    tenant: Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="Of one tenant alone.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, newest first.")] = 50,
) -> None:
    """Which key changed what, newest first: for administrators."""
    with session.client() as client:
        found = list(islice(client.tenants.audit(tenant_id=tenant, limit=min(limit, 200)), limit))
    if session.json:
        for one in found:
            output.print_json(one)
        return
    rows = [
        (f"{one.at:%Y-%m-%d %H:%M:%S}Z", one.tenant_id, one.key_id, one.status, one.action, one.subject)
        for one in found
    ]
    output.print_table(("at", "tenant", "key", "status", "action", "on"), rows, right=(3,))


def _state(one: KeyView) -> str:
    if one.revoked_at is not None:
        return "revoked"
    if one.expires_at is None:
        return "good"
    return f"{'expired' if one.expired else 'good until'} {one.expires_at:%Y-%m-%d %H:%M}Z"


def _print_key(session: Session, one: KeyView) -> None:
    if session.json:
        output.print_json(one)
        return
    output.print_fields(
        [
            ("key", one.id),
            ("name", one.name),
            ("tenant", one.tenant_id),
            ("scopes", ", ".join(one.scopes)),
            ("state", _state(one)),
            ("follows", one.rotated_from),
            ("used", one.last_used_at),
        ]
    )


def _print_new(session: Session, made: NewKeyView) -> None:
    if session.json:
        output.print_json(made)
        return
    _print_key(session, made.record)
    output.say(made.key)
    output.note("Keep the key: it is shown this once.")


def _print_tenant(session: Session, one: TenantView) -> None:
    if session.json:
        output.print_json(one)
        return
    output.say(f"tenant {one.id}")
    _print_use(one.quotas, one.usage)


def _print_use(quotas: dict[str, int], use: UsageView) -> None:
    used = {
        "max_queued_jobs": str(use.queued_jobs),
        "max_running_jobs": str(use.running_jobs),
        "max_storage_bytes": output.size_text(use.storage_bytes),
        "max_gpu_seconds_month": output.duration_text(use.gpu_seconds_month),
    }
    shown = {"max_storage_bytes": output.size_text, "max_gpu_seconds_month": output.duration_text}
    rows = [
        (name, used.get(name, ""), shown.get(name, "{:,.0f}".format)(bound) if bound else "no bound")
        for name, bound in quotas.items()
    ]
    output.print_table(("quota", "used", "of"), rows, right=(1, 2))
