"""Run in the environment of an orchestrator, by test_orchestrators.py: `python orchestrated.py airflow|prefect` with a request on standard input.

The request is JSON: address, key, recipe. Prints what each run gave, one JSON document a line.
"""

import json
import os
import sys
from typing import Any


def airflow(request: dict[str, Any]) -> None:
    """A DAG's test run in this process, as `airflow dags test` does it: one task that keeps its gate, and one that misses it."""
    import datetime as dt

    from airflow.sdk import DAG

    from nightpress.client.airflow import NightpressOperator, NightpressTrigger

    with DAG("nights", schedule=None, start_date=dt.datetime(2026, 1, 1, tzinfo=dt.UTC)) as dag:
        given = {"model": "tiny", "recipe": request["recipe"], "poll_s": 0.1}
        NightpressOperator(task_id="kept", gates={"size": "<= 60%"}, labels={"by": "{{ dag.dag_id }}"}, **given)
        NightpressOperator(task_id="deferred", gates={"size": "<= 61%"}, deferrable=True, **given)
        NightpressOperator(task_id="missed", gates={"size": "<= 1%"}, retries=0, **given)
    run = dag.test()
    for task in run.get_task_instances():
        say({"task": task.task_id, "state": str(task.state), "xcom": task.xcom_pull(task_ids=task.task_id)})
    path, fields = NightpressTrigger("job_1", "conn", 2.0).serialize()
    say({"trigger": path, **fields})


def prefect(request: dict[str, Any]) -> None:
    """A flow that triggers two jobs."""
    from prefect import flow

    from nightpress.client.outcomes import GateMissedError
    from nightpress.client.prefect import NightpressJob, NightpressService

    @flow
    async def nights() -> list[dict[str, Any]]:
        service = NightpressService(api_url=request["address"], api_key=request["key"])
        await service.save("nights", overwrite=True)
        found = []
        for bound in ("<= 60%", "<= 1%"):
            job = NightpressJob(
                service=await NightpressService.load("nights"),
                model="tiny",
                recipe=request["recipe"],
                gates={"size": bound},
                labels={"by": "prefect"},
                poll_s=0.1,
            )
            run = await job.trigger()
            await run.wait_for_completion()
            try:
                ended = await run.fetch_result()
                found.append({"id": ended.id, "verdict": ended.verdict})
            except GateMissedError as error:
                found.append({"id": run.job_id, "error": str(error)})
        return found

    import asyncio

    for outcome in asyncio.run(nights()):
        say(outcome)


def say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    os.environ["AIRFLOW_CONN_NIGHTPRESS_DEFAULT"] = json.dumps(
        {"conn_type": "http", "host": asked["address"], "password": asked["key"]}
    )
    {"airflow": airflow, "prefect": prefect}[sys.argv[1]](asked)
