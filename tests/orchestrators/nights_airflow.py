"""A DAG whose tasks press models, for test_orchestrators.py. As a program it runs the DAG and prints what each task gave."""

import datetime as dt
import json
import os
import sys
from typing import Any

from airflow.sdk import DAG

from nightpress.client.airflow import NightpressOperator, NightpressTrigger

given: dict[str, Any] = {"model": "tiny", "recipe": json.loads(os.environ["RECIPE"]), "poll_s": 0.1}
with DAG("nights", schedule=None, start_date=dt.datetime(2026, 1, 1, tzinfo=dt.UTC)) as dag:
    NightpressOperator(task_id="kept", gates={"size": "<= 60%"}, labels={"by": "{{ dag.dag_id }}"}, **given)
    NightpressOperator(task_id="deferred", gates={"size": "<= 61%"}, deferrable=True, **given)
    NightpressOperator(task_id="missed", gates={"size": "<= 1%"}, retries=0, **given)


def say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    run = dag.test()
    for task in run.get_task_instances():
        say({"task": task.task_id, "state": str(task.state), "xcom": task.xcom_pull(task_ids=task.task_id)})
    path, fields = NightpressTrigger("job_1", "conn", 2.0).serialize()
    say({"trigger": path, **fields})
