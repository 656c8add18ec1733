"""`python -m nightpress.migrations upgrade|downgrade|check [--url …] [--to REVISION]`, `python -m nightpress.migrations revision -m MESSAGE`."""

import argparse

from nightpress import migrations
from nightpress.core.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nightpress.migrations", description="Change the database's shape.")
    parser.add_argument("action", choices=["upgrade", "downgrade", "check", "revision"])
    parser.add_argument("--url", help="SQLAlchemy URL; default: NIGHTPRESS_DATABASE_URL")
    parser.add_argument("--to", help="revision; default: head for upgrade, base for downgrade")
    parser.add_argument("-m", "--message", default="", help="what a new revision does")
    given = parser.parse_args()
    url = given.url or load_settings().sql_url
    if given.action == "upgrade":
        migrations.upgrade(url, given.to or "head")
    elif given.action == "downgrade":
        migrations.downgrade(url, given.to or "base")
    elif given.action == "check":
        migrations.check(url)
    else:
        migrations.make_revision(url, given.message)


if __name__ == "__main__":
    main()
