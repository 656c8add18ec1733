"""F22: three control processes with the same schedules: every fire makes one run and one job."""

import datetime as dt
from pathlib import Path

import pytest
from sqlalchemy import func, select, update

from nightpress.core.database import transaction
from nightpress.core.service.compose import Resources
from nightpress.core.service.tables.jobs import jobs
from nightpress.core.service.tables.schedules import schedule_runs, schedules
from nightpress.core.wire.jobs import JobRequest
from nightpress.core.wire.models import ModelCreate
from nightpress.core.wire.schedules import ScheduleCreate
from tests.service import TENANT, Service, eventually

SCHEDULES, FIRES = 4, 4


@pytest.mark.slow
@pytest.mark.parametrize("clocks", [("", "", ""), ("3600", "-3600", "")], ids=["right", "two hours apart"])
def test_every_fire_happens_once_with_three_control_processes(
    tmp_path: Path, sql_url: str, bert_tiny: Path, clocks: tuple[str, ...]
):
    service = Service(tmp_path, sql_url, tick_s=0.05, model_roots=[bert_tiny.parent])
    try:
        resources = Resources(service.settings, service.engine)
        resources.models.create(TENANT, ModelCreate(name="tiny", path=str(bert_tiny)))
        store, people = resources.schedule_store, resources.schedules
        for number in range(SCHEDULES):
            job = JobRequest(model="tiny", recipe="int8-encoder")
            wanted = ScheduleCreate(name=f"s{number}", cron="*/5 * * * *", catch_up="all", overlap="replace", job=job)
            people.create(TENANT, wanted)
        start = store.now().replace(second=0, microsecond=0) - dt.timedelta(minutes=5 * FIRES)
        start -= dt.timedelta(minutes=start.minute % 5)
        processes = [service.start_control(clock) for clock in clocks]
        eventually(lambda: "ticks every" in service.output() and service.output().count("ticks every") == 3)
        with transaction(service.engine) as connection:
            connection.execute(update(schedules).values(next_at=start))
        wanted_runs = SCHEDULES * FIRES

        def settled() -> bool:
            with transaction(service.engine, read_only=True) as connection:
                states = dict(
                    connection.execute(
                        select(schedule_runs.c.state, func.count()).group_by(schedule_runs.c.state)
                    ).all()
                )
            return sum(states.values()) >= wanted_runs and "pending" not in states

        eventually(settled, within=40)
        assert all(process.poll() is None for process in processes)
        with transaction(service.engine, read_only=True) as connection:
            slots = connection.execute(
                select(schedule_runs.c.schedule_id, schedule_runs.c.scheduled_for, schedule_runs.c.job_id)
            ).all()
            made = set(connection.scalars(select(jobs.c.id).where(jobs.c.state != "cancelled")))
            live = {row.job_id for row in slots if row.job_id in made}
        assert len({(row.schedule_id, row.scheduled_for) for row in slots}) == len(slots)
        assert len(slots) >= wanted_runs
        named = [row.job_id for row in slots if row.job_id]
        assert len(named) == len(set(named))
        # Only the newest job of each schedule is left, and every job has a run.
        assert made == live
        assert len(made) == SCHEDULES
    finally:
        service.close()
