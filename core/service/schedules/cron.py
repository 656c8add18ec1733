"""The times at which a schedule fires: five-field cron in a time zone, computed by cronsim, which treats clock changes as Debian's cron.

A fixed time that the change to summer time skips fires at the end of the gap. A fixed time that the change back repeats fires only the
first time. If the hour or the minute is `*`, every hour that passes counts.
"""

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice, pairwise
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from nightpress.core.errors import ErrorCode, NightpressError

MAX_LENGTH = 200
#: number of fires that are checked: with one every five minutes, it covers every gap of a day and the gap over midnight
_SAMPLE = 300


@dataclass(frozen=True)
class Cron:
    """An expression and an IANA time zone. Made by `parse_cron`, which checks both."""

    expression: str
    timezone: str

    def after(self, moment: dt.datetime) -> Iterator[dt.datetime]:
        """Every fire after `moment`, in UTC, strictly increasing. Ends if cronsim finds no fire within 50 years."""
        last = moment.astimezone(dt.UTC)
        for fire in CronSim(self.expression, last.astimezone(ZoneInfo(self.timezone))):
            # cronsim restarts at the first pass of a repeated hour, and a gap can map two fires to the same time: skip duplicates.
            instant = fire.astimezone(dt.UTC)
            if instant > last:
                last = instant
                yield instant

    def next(self, moment: dt.datetime) -> dt.datetime | None:
        return next(self.after(moment), None)

    def until(self, moment: dt.datetime, end: dt.datetime) -> Iterator[dt.datetime]:
        """The fires in (moment, end]."""
        for fire in self.after(moment):
            if fire > end:
                return
            yield fire


def parse_cron(expression: str, timezone: str, *, min_interval_s: float, now: dt.datetime) -> Cron:
    """Parse a five-field cron expression and an IANA time zone.

    Raises NightpressError(invalid_schedule) for an invalid expression or zone, or one that never fires or fires too often.
    """
    if timezone not in _zones():
        raise _invalid(
            f"{timezone[:80]!r} is not a time zone.", "Name one of the IANA data base, e.g. Europe/Berlin or UTC."
        )
    fields = expression.split()
    if len(fields) != 5 or len(expression) > MAX_LENGTH:
        raise _invalid(
            f"{expression[:80]!r} has {len(fields)} fields; a cron expression has five.",
            "minute hour day-of-month month day-of-week, e.g. `0 2 * * *` for two at night.",
        )
    cron = Cron(" ".join(fields), timezone)
    try:
        upcoming = list(islice(Cron(cron.expression, "UTC").after(now), _SAMPLE))
    except CronSimError as error:
        raise _invalid(
            f"{expression!r} is not a cron expression: {str(error).lower()}.",
            "minute hour day-of-month month day-of-week, e.g. `0 2 * * *` for two at night.",
        ) from error
    if not upcoming:
        raise _invalid(f"{expression!r} never fires.", "Is there such a date?")
    closest = min(((later - sooner).total_seconds() for sooner, later in pairwise(upcoming)), default=min_interval_s)
    if closest < min_interval_s:
        raise _invalid(
            f"{expression!r} fires {closest:.0f} s apart; at least {min_interval_s:.0f} s are allowed here.",
            "Choose a longer interval, or ask the operator to lower NIGHTPRESS_SCHEDULE_MIN_INTERVAL_S.",
        )
    return cron


@cache
def _zones() -> frozenset[str]:
    """The known time zones. An allow-list, because a zone's name is used as a file path and must not lead to another file."""
    return frozenset(available_timezones())


def _invalid(message: str, hint: str) -> NightpressError:
    return NightpressError(ErrorCode.INVALID_SCHEDULE, message, hint=hint)
