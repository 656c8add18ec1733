"""The operator's commands for API keys, directly on the database.

`python -m nightpress.core.service.access create-key --name …` and `… revoke-key ID`.
"""

import argparse
import datetime as dt
import sys

from nightpress.core.database import make_engine, read_now, transaction
from nightpress.core.errors import NightpressError
from nightpress.core.service.access.keys import ALL_SCOPES, create_key, revoke
from nightpress.core.settings import load_settings


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nightpress.core.service.access", description="Make and revoke API keys."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create-key", help="make a key and print it, this once")
    create.add_argument("--name", required=True, help="who or what will use it")
    create.add_argument("--tenant", default="default")
    create.add_argument(
        "--scope",
        action="append",
        choices=sorted(ALL_SCOPES),
        help="may be given more than once; default: all but admin",
    )
    create.add_argument("--days", type=float, help="how long it works; default: until revoked")
    actions.add_parser("revoke-key", help="end a key").add_argument("id", help="the eight characters after np_")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = _parse(arguments)
    engine = make_engine(load_settings().sql_url, pool_size=1)
    try:
        if given.action == "revoke-key":
            if revoke(engine, given.id):
                return 0
            sys.stderr.write(f"There is no key {given.id} that still works.\n")
            return 1
        expires_at = None
        if given.days is not None:
            with transaction(engine, read_only=True) as connection:
                expires_at = read_now(connection) + dt.timedelta(days=given.days)
        scopes = given.scope or ALL_SCOPES - {"admin"}
        _, plain = create_key(engine, tenant_id=given.tenant, name=given.name, scopes=scopes, expires_at=expires_at)
    except NightpressError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    finally:
        engine.dispose()
    sys.stdout.write(plain + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
