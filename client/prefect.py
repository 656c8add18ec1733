"""Blocks for Prefect 3: a service with its key, and a job that a flow triggers and waits for.

>>> from nightpress.client.prefect import NightpressJob, NightpressService
>>> service = NightpressService(api_url="https://nights.example.com", api_key="np_…")
>>> press = NightpressJob(service=service, model="all-minilm-l6-v2", recipe="int8-encoder", gates={"size": "<= 50%"})
>>> run = await press.trigger()
>>> await run.wait_for_completion()
>>> job = await run.fetch_result()

Prefect is not in Nightpress's extras: install `nightpress` where flows run.
"""

from typing import Any

from anyio import to_thread
from prefect.blocks.abstract import JobBlock, JobRun
from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from nightpress.client.client import Client
from nightpress.client.gates import with_gates
from nightpress.client.outcomes import ensure_accepted
from nightpress.core.wire.jobs import JobView


class NightpressService(Block):  # type: ignore[misc]
    """A Nightpress service and a key for it."""

    _block_type_name = "Nightpress Service"
    _block_type_slug = "nightpress-service"

    api_url: str = Field(description="The service's address.")
    api_key: SecretStr = Field(description="An API key, np_….")

    def get_client(self) -> Client:
        """A client. Close it, or use it with `with`."""
        return Client(self.api_url, self.api_key.get_secret_value())


class NightpressRun(JobRun[JobView]):  # type: ignore[misc]
    """A job that was submitted."""

    def __init__(self, service: NightpressService, job_id: str, poll_s: float) -> None:
        self._service = service
        self.job_id = job_id
        self._poll_s = poll_s

    async def wait_for_completion(self) -> None:
        """Wait for the job's end, whatever it is."""
        await to_thread.run_sync(self._wait, abandon_on_cancel=True)

    async def fetch_result(self) -> JobView:
        """The job, if its result was accepted. Raises JobFailedError or GateMissedError, from nightpress.client.outcomes."""
        return ensure_accepted(await to_thread.run_sync(self._wait, abandon_on_cancel=True))

    def _wait(self) -> JobView:
        with self._service.get_client() as client:
            return client.jobs.wait(self.job_id, poll_s=self._poll_s)


class NightpressJob(JobBlock[JobView]):  # type: ignore[misc]
    """A recipe on a model, with gates."""

    _block_type_name = "Nightpress Job"
    _block_type_slug = "nightpress-job"

    service: NightpressService
    model: str = Field(description="A model's id or name at the service.")
    recipe: str | dict[str, Any] = Field(description="A built-in recipe's name, or a recipe as a mapping.")
    gates: dict[str, str] = Field(
        default_factory=dict, description="Figure → bound, in place of the recipe's own for these figures."
    )
    job_name: str = Field("", description="A title for the job.")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels to find the job by.")
    reuse: bool = Field(False, description="Take the result of an identical job, if one has succeeded.")
    poll_s: float = Field(5.0, gt=0, description="Seconds between two looks at the job.")

    async def trigger(self) -> NightpressRun:
        """Submit the job."""
        job = await to_thread.run_sync(self._submit)
        self.logger.info("Job %s is in the queue %s.", job.id, job.queue)
        return NightpressRun(self.service, job.id, self.poll_s)

    def _submit(self) -> JobView:
        fields: dict[str, Any] = {"name": self.job_name, "labels": self.labels, "reuse": self.reuse}
        with self.service.get_client() as client:
            return client.jobs.submit(self.model, with_gates(client, self.recipe, self.gates), **fields)
