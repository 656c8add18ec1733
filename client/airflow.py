"""An operator for Apache Airflow 3: a task that presses a model and fails if the result misses a gate.

>>> from nightpress.client.airflow import NightpressOperator
>>> NightpressOperator(task_id="press", model="all-minilm-l6-v2", recipe="int8-encoder", gates={"size": "<= 50%"})

The connection `nightpress_default` (type HTTP) holds the service's address as its host and an API key as its password. Wheels of Airflow are
not in Nightpress's extras: install `nightpress` where Airflow's workers run.
"""

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from airflow.sdk import BaseHook, BaseOperator
from airflow.triggers.base import BaseTrigger, TriggerEvent

from nightpress.client.asynchronous import AsyncClient
from nightpress.client.client import Client
from nightpress.client.gates import with_gates
from nightpress.client.outcomes import ensure_accepted
from nightpress.core.wire.jobs import JobView


class NightpressOperator(BaseOperator):  # type: ignore[misc]
    """Submits a job, waits for its end, and pushes `{"id", "verdict", "model_name"}` as its XCom.

    A task that Airflow runs again, e.g. after its worker was lost, goes on with the job of the same try. Raises JobFailedError or
    GateMissedError, from nightpress.client.outcomes.
    """

    template_fields: Sequence[str] = ("model", "recipe", "gates", "job_name", "labels")
    ui_color = "#e8eaf6"

    def __init__(
        self,
        *,
        model: str,
        recipe: str | dict[str, Any],
        gates: Mapping[str, str] | None = None,
        job_name: str = "",
        labels: Mapping[str, str] | None = None,
        reuse: bool = False,
        conn_id: str = "nightpress_default",
        deferrable: bool = False,
        poll_s: float = 5.0,
        **kwargs: Any,
    ) -> None:
        """deferrable: wait in Airflow's triggerer, so that the task holds no worker while the job runs."""
        super().__init__(**kwargs)
        self.model = model
        self.recipe = recipe
        self.gates = dict(gates or {})
        self.job_name = job_name
        self.labels = dict(labels or {})
        self.reuse = reuse
        self.conn_id = conn_id
        self.deferrable = deferrable
        self.poll_s = poll_s
        self._job_id: str | None = None

    def execute(self, context: Any) -> dict[str, Any]:
        task = context["ti"]
        attempt = f"airflow {task.dag_id} {task.run_id} {task.task_id} {task.map_index} {task.try_number}"
        with self._client() as client:
            job = client.jobs.submit(
                self.model,
                with_gates(client, self.recipe, self.gates),
                idempotency_key=hashlib.sha256(attempt.encode()).hexdigest(),
                name=self.job_name,
                labels=self.labels,
                reuse=self.reuse,
            )
            self._job_id = job.id
            self.log.info("Job %s is in the queue %s.", job.id, job.queue)
            if self.deferrable:
                self.defer(trigger=NightpressTrigger(job.id, self.conn_id, self.poll_s), method_name="resume")
            return _shown(ensure_accepted(client.jobs.wait(job.id, poll_s=self.poll_s)))

    def resume(self, context: Any, event: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002 - Airflow's signature
        """The rest of a deferred task."""
        with self._client() as client:
            return _shown(ensure_accepted(client.jobs.get(event["job_id"])))

    def on_kill(self) -> None:
        if self._job_id is not None:
            with self._client() as client:
                client.jobs.cancel(self._job_id)

    def _client(self) -> Client:
        return Client(*_address(BaseHook.get_connection(self.conn_id)))


class NightpressTrigger(BaseTrigger):  # type: ignore[misc]
    """Waits for a job's end in Airflow's triggerer."""

    def __init__(self, job_id: str, conn_id: str, poll_s: float) -> None:
        super().__init__()
        self.job_id = job_id
        self.conn_id = conn_id
        self.poll_s = poll_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        given = {"job_id": self.job_id, "conn_id": self.conn_id, "poll_s": self.poll_s}
        return "nightpress.client.airflow.NightpressTrigger", given

    async def run(self) -> AsyncIterator[TriggerEvent]:
        connection = await BaseHook.aget_connection(self.conn_id)
        async with AsyncClient(*_address(connection)) as client:
            job = await client.jobs.wait(self.job_id, poll_s=self.poll_s)
        yield TriggerEvent({"job_id": job.id})


def _address(connection: Any) -> tuple[str, str | None]:
    """The service's address and the key of an Airflow connection. A host without a scheme is taken as https."""
    host = connection.host or ""
    address = host if "://" in host else f"{connection.schema or 'https'}://{host}"
    return (f"{address}:{connection.port}" if connection.port else address), connection.password


def _shown(job: JobView) -> dict[str, Any]:
    return {"id": job.id, "verdict": job.verdict, "model_name": job.model_name}
