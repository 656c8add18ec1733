"""When schedules fire: tables of times around clock changes; and expressions that are not valid."""

import contextlib
import datetime as dt
import time
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.schedules.cron import Cron, parse_cron

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)


def utc(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def parsed(expression: str, timezone: str = "UTC", **more: Any) -> Cron:
    return parse_cron(expression, timezone, **({"min_interval_s": 300.0, "now": NOW} | more))


@pytest.mark.parametrize(
    ("cron", "zone", "after", "fires"),
    [
        # Spring: the local time does not exist, and the schedule fires at the end of the gap.
        ("30 2 * * *", "America/New_York", "2027-03-13T12:00", ["2027-03-14T07:00", "2027-03-15T06:30"]),
        ("30 2 * * *", "Europe/Berlin", "2027-03-27T12:00", ["2027-03-28T01:00", "2027-03-29T00:30"]),
        # Autumn: the local time comes twice, and the schedule fires the first time.
        ("30 1 * * *", "America/New_York", "2026-10-31T12:00", ["2026-11-01T05:30", "2026-11-02T06:30"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", ["2026-10-25T00:30", "2026-10-26T01:30"]),
        # Asked within the repeated hour, after the first 01:30: the next fire is tomorrow.
        ("30 1 * * *", "America/New_York", "2026-11-01T05:45", ["2026-11-02T06:30"]),
        ("30 1 * * *", "America/New_York", "2026-11-01T06:10", ["2026-11-02T06:30"]),
        # An hourly schedule fires in both copies of the repeated hour.
        ("0 * * * *", "America/New_York", "2026-11-01T04:30", ["2026-11-01T05:00", "2026-11-01T06:00"]),
        # Summer time of half an hour.
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-02T16:00", ["2026-10-03T15:30", "2026-10-04T15:15"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T12:00", ["2026-04-04T14:45", "2026-04-05T15:15"]),
        # A UTC offset with three quarters of an hour.
        ("0 3 * * *", "Pacific/Chatham", "2026-09-25T15:00", ["2026-09-26T14:00", "2026-09-27T13:15"]),
        ("0 3 * * *", "Pacific/Chatham", "2026-04-03T15:00", ["2026-04-04T13:15", "2026-04-05T14:15"]),
        # Summer time of two hours.
        ("30 1 * * *", "Antarctica/Troll", "2026-03-28T12:00", ["2026-03-29T01:00", "2026-03-29T23:30"]),
        ("30 1 * * *", "Antarctica/Troll", "2026-10-24T12:00", ["2026-10-24T23:30", "2026-10-26T01:30"]),
        # Two times in one gap fire once.
        ("15,45 2 * * *", "America/New_York", "2027-03-14T00:00", ["2027-03-14T07:00", "2027-03-15T06:15"]),
        ("0 0 29 2 *", "UTC", "2026-11-23T12:00", ["2028-02-29T00:00", "2032-02-29T00:00"]),
        ("0 0 L * *", "UTC", "2027-01-31T12:00", ["2027-02-28T00:00", "2027-03-31T00:00"]),
    ],
)
def test_fires_around_clock_changes(cron: str, zone: str, after: str, fires: list[str]):
    found = list(islice(parsed(cron, zone).after(utc(after)), len(fires)))
    assert found == [utc(fire) for fire in fires]


@pytest.mark.parametrize(
    ("cron", "zone", "why"),
    [
        ("* * * * *", "UTC", "60 s apart"),
        ("0,1 2 * * *", "UTC", "60 s apart"),
        ("59 23 * * *", "../../etc/localtime", "time zone"),
        ("0 2 * * *", "posix/UTC", "time zone"),
        ("0 2 * * *", "/etc/localtime", "time zone"),
        ("0 2 * * *", "Mars/Olympus", "time zone"),
        ("0 0 30 2 *", "UTC", "bad day-of-month"),
        ("0 2 * *", "UTC", "4 fields"),
        ("0 0 2 * * *", "UTC", "6 fields"),
        ("@daily", "UTC", "1 fields"),
        ("61 2 * * *", "UTC", "bad minute"),
        ("*/0 2 * * *", "UTC", "bad minute"),
        ("0 2 * * MON;rm", "UTC", "bad day-of-week"),
        ("0," * 150 + "0 2 * * *", "UTC", "fields"),
    ],
)
def test_what_is_no_schedule(cron: str, zone: str, why: str):
    with pytest.raises(NightpressError) as caught:
        parsed(cron, zone)
    assert caught.value.code is ErrorCode.INVALID_SCHEDULE
    assert why in caught.value.message


ZONES = st.sampled_from(
    ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Chatham", "Antarctica/Troll"]
)


@settings(max_examples=40)
@given(
    minute=st.integers(0, 59),
    hour=st.integers(0, 23),
    zone=ZONES,
    moment=st.datetimes(dt.datetime(2020, 1, 1), dt.datetime(2040, 1, 1), timezones=st.just(dt.UTC)),
)
@pytest.mark.slow
def test_every_fire_is_later_and_no_day_fires_twice(minute: int, hour: int, zone: str, moment: dt.datetime):
    fires = list(islice(parsed(f"{minute} {hour} * * *", zone).after(moment), 20))
    assert all(later > sooner for sooner, later in zip([moment, *fires], fires, strict=False))
    days = [fire.astimezone(ZoneInfo(zone)).date() for fire in fires]
    assert len(set(days)) == len(days)
    assert all((later - sooner).days == 1 for sooner, later in pairwise(days))


@pytest.mark.parametrize(
    "expression",
    [
        "0 0 30 2 *",
        "0 0 31 2,4,6,9,11 *",
        "59 23 29 2 1#5",
        "0 0 29 2 MON",
        ",".join(["0-59"] * 38) + " * * * *",
        "*/1,*/2,*/3,*/4,*/5,*/6,*/7 */1,*/2,*/3 1,2,3,4,5,6,7 */1 *",
        "9" * 190 + " * * * *",
        "² * * * *",
        "* * * * * ",
        "*/" + "9" * 180 + " * * * *",
    ],
)
def test_the_worst_expressions_cost_less_than_a_second(expression: str):
    began = time.thread_time()
    with contextlib.suppress(NightpressError):
        parse_cron(expression, "UTC", min_interval_s=60, now=dt.datetime(2026, 3, 1, tzinfo=dt.UTC))
    assert time.thread_time() - began < 1.0
