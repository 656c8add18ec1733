"""The asynchronous client: client.py with `await`. Requests come from client.calls, transfers run in threads with the synchronous code."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx

from client import calls
from client.calls import Call
from client.client import Client, schedule_of
from client.errors import ApiError, UnreachableError
from client.events import EVENTS, LOGS, Numbered, Stream, Tail
from client.folders import plain_name
from client.transfers import UNWATCHED, Meter
from client.transport import Attempts, read_answer
from client.waiting import Pace
from core.recipes.plan import Plan
from core.schemas import (
    TERMINAL_STATES,
    ArtifactView,
    DataSetCreate,
    DataSetView,
    EventView,
    JobCreate,
    JobView,
    LatestView,
    LogView,
    ModelCreate,
    ModelView,
    Page,
    ReadyView,
    RecipeView,
    ReportView,
    ScheduleRunView,
    ScheduleUpdate,
    ScheduleView,
    WorkerView,
)

Answer = TypeVar("Answer")
Item = TypeVar("Item")
NumberedItem = TypeVar("NumberedItem", bound=Numbered)


class AsyncClient:
    """As `client.Client`, for an event loop. To be closed with `aclose()` or used with `async with`."""

    def __init__(
        self, api_url: str | None = None, api_key: str | None = None, *, timeout_s: float = 30.0, retries: int = 3
    ) -> None:
        self.blocking = Client(api_url, api_key, timeout_s=timeout_s, retries=retries)
        self.options = self.blocking.options
        self.http = httpx.AsyncClient(**self.options.http_options())
        self.models = AsyncModels(self)
        self.data_sets = AsyncDataSets(self)
        self.recipes = AsyncRecipes(self)
        self.jobs = AsyncJobs(self)
        self.schedules = AsyncSchedules(self)

    async def send(self, call: Call[Answer]) -> Answer:
        """Make one request of `client.calls`, with retries. Raises ApiError or UnreachableError."""
        attempts = Attempts(self.options, repeatable=call.repeatable, accept=call.accept)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self.http.request(**self.options.request(call))
            except httpx.TransportError as error:
                outcome = error
            pause = attempts.pause_after(outcome)
            if pause is None:
                return read_answer(call, self.options, outcome)
            await asyncio.sleep(pause)

    async def in_thread(self, transfer: Callable[[threading.Event], Answer]) -> Answer:
        """Run a blocking transfer; cancelling the task stops it at its next chunk."""
        stop = threading.Event()
        try:
            return await asyncio.to_thread(transfer, stop)
        finally:
            stop.set()

    async def workers(self) -> list[WorkerView]:
        return await self.send(calls.list_workers())

    async def ready(self) -> ReadyView:
        return await self.send(calls.ready())

    async def me(self) -> dict[str, Any]:
        return await self.send(calls.me())

    async def aclose(self) -> None:
        self.blocking.close()
        await self.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Resource:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._send = client.send

    async def _every(self, page_of: Callable[[str | None], Call[Page[Item]]]) -> AsyncIterator[Item]:
        cursor: str | None = None
        while True:
            page = await self._send(page_of(cursor))
            for item in page.items:
                yield item
            if not (cursor := page.next_cursor):
                return


class AsyncModels(_Resource):
    async def list(self, *, cursor: str | None = None, limit: int = 50) -> Page[ModelView]:
        return await self._send(calls.page_models(cursor=cursor, limit=limit))

    def iterate(self) -> AsyncIterator[ModelView]:
        return self._every(lambda cursor: calls.page_models(cursor=cursor, limit=200))

    async def get(self, model: str) -> ModelView:
        return await self._send(calls.get_model(model))

    async def latest(self, model: str) -> LatestView:
        return await self._send(calls.latest_of(model))

    async def delete(self, model: str) -> None:
        await self._send(calls.delete_model(model))

    async def register(self, path: str, name: str | None = None) -> ModelView:
        name = name or plain_name(Path(path).name)
        return await self._send(calls.create_model(ModelCreate(name=name, path=path)))

    async def upload(self, folder: Path, name: str | None = None, *, meter: Meter = UNWATCHED) -> ModelView:
        models = self._client.blocking.models
        return await self._client.in_thread(lambda stop: models.upload(folder, name, meter=meter, stop=stop))


class AsyncDataSets(_Resource):
    async def list(self, *, cursor: str | None = None, limit: int = 50) -> Page[DataSetView]:
        return await self._send(calls.page_data_sets(cursor=cursor, limit=limit))

    def iterate(self) -> AsyncIterator[DataSetView]:
        return self._every(lambda cursor: calls.page_data_sets(cursor=cursor, limit=200))

    async def get(self, data_set: str) -> DataSetView:
        return await self._send(calls.get_data_set(data_set))

    async def delete(self, data_set: str) -> None:
        await self._send(calls.delete_data_set(data_set))

    async def register(self, path: str, name: str | None = None) -> DataSetView:
        name = name or plain_name(Path(path).name.split(".")[0])
        return await self._send(calls.create_data_set(DataSetCreate(name=name, path=path)))

    async def upload(self, file: Path, name: str | None = None, *, meter: Meter = UNWATCHED) -> DataSetView:
        data_sets = self._client.blocking.data_sets
        return await self._client.in_thread(lambda stop: data_sets.upload(file, name, meter=meter, stop=stop))


class AsyncRecipes(_Resource):
    async def list(self) -> list[RecipeView]:
        return await self._send(calls.list_recipes())

    async def get(self, name: str) -> RecipeView:
        return await self._send(calls.get_recipe(name))

    async def validate(self, recipe: dict[str, Any] | str, model: str | None = None) -> Plan:
        return await self._send(calls.validate_recipe(recipe, model))


class AsyncJobs(_Resource):
    async def submit(
        self, model: str, recipe: str | dict[str, Any], *, idempotency_key: str | None = None, **fields: Any
    ) -> JobView:
        return await self._send(calls.submit_job(JobCreate(model=model, recipe=recipe, **fields), idempotency_key))

    async def list(
        self,
        *,
        states: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        model: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[JobView]:
        call = calls.page_jobs(states=states, labels=labels, model=model, cursor=cursor, limit=limit)
        return await self._send(call)

    def iterate(
        self, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None, model: str | None = None
    ) -> AsyncIterator[JobView]:
        return self._every(
            lambda cursor: calls.page_jobs(states=states, labels=labels, model=model, cursor=cursor, limit=200)
        )

    async def get(self, job_id: str) -> JobView:
        return await self._send(calls.get_job(job_id))

    async def cancel(self, job_id: str) -> JobView:
        return await self._send(calls.cancel_job(job_id))

    async def retry(self, job_id: str) -> JobView:
        return await self._send(calls.retry_job(job_id))

    async def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 1.0,
        patience_s: float = 120.0,
        on_update: Callable[[JobView], None] | None = None,
    ) -> JobView:
        pace = Pace(timeout_s, poll_s, patience_s)
        while True:
            try:
                job = await self.get(job_id)
            except (UnreachableError, ApiError) as error:
                pause = pace.after_error(error)
            else:
                if on_update:
                    on_update(job)
                if job.state in TERMINAL_STATES:
                    return job
                pause = pace.after(job)
            await asyncio.sleep(pause)

    def events(self, job_id: str, *, after: int = 0, patience_s: float = 120.0) -> AsyncIterator[EventView]:
        return self._follow(EVENTS, job_id, after, patience_s)

    async def past_events(self, job_id: str, *, after: int = 0, limit: int = 500) -> Sequence[EventView]:
        return await self._send(calls.list_events(job_id, after=after, limit=limit))

    async def logs(
        self, job_id: str, *, after: int = 0, follow: bool = False, patience_s: float = 120.0
    ) -> AsyncIterator[LogView]:
        if follow:
            async for line in self._follow(LOGS, job_id, after, patience_s):
                yield line
            return
        while lines := await self._send(calls.list_logs(job_id, after=after)):
            for line in lines:
                yield line
            after = lines[-1].seq

    async def _follow(
        self, stream: Stream[NumberedItem], job_id: str, after: int, patience_s: float
    ) -> AsyncIterator[NumberedItem]:
        tail = Tail(self._client.options, stream, job_id, after, patience_s)
        while True:
            error: httpx.TransportError | ApiError | None = None
            async with AsyncExitStack() as stack:
                try:
                    response = await stack.enter_async_context(self._client.http.stream(**tail.request()))
                    if response.status_code >= 400:
                        await response.aread()
                        raise ApiError.from_response(response)
                    async for line in response.aiter_lines():
                        if (item := tail.feed(line)) is not None:
                            yield item
                except (httpx.TransportError, ApiError) as caught:
                    error = caught
            if error is not None:
                await asyncio.sleep(tail.pause_after(error))
            elif (await self.get(job_id)).state in TERMINAL_STATES:
                while rest := await self._send(tail.rest()):
                    for item in rest:
                        if tail.seen(item) is not None:
                            yield item
                return

    async def artifacts(self, job_id: str) -> Sequence[ArtifactView]:
        return await self._send(calls.list_artifacts(job_id))

    async def report(self, job_id: str) -> ReportView:
        return await self._send(calls.get_report(job_id))

    async def drawn_report(self, job_id: str, form: Literal["html", "md"]) -> str:
        return await self._send(calls.get_drawn_report(job_id, form))

    async def download(
        self, job_id: str, folder: Path, *, formats: Sequence[str] = (), meter: Meter = UNWATCHED
    ) -> Sequence[Path]:
        jobs = self._client.blocking.jobs
        return await self._client.in_thread(
            lambda stop: jobs.download(job_id, folder, formats=formats, meter=meter, stop=stop)
        )


class AsyncSchedules(_Resource):
    async def create(
        self, name: str, cron: str, model: str, recipe: str | dict[str, Any], *, timezone: str = "UTC", **fields: Any
    ) -> ScheduleView:
        request = schedule_of(name, cron, model, recipe, timezone, fields)
        return await self._send(calls.create_schedule(request))

    async def get(self, schedule: str) -> ScheduleView:
        return await self._send(calls.get_schedule(schedule))

    def iterate(self) -> AsyncIterator[ScheduleView]:
        return self._every(lambda cursor: calls.page_schedules(cursor=cursor, limit=200))

    async def edit(self, schedule: str, *, version: int | None = None, **changes: Any) -> ScheduleView:
        return await self._send(calls.edit_schedule(schedule, ScheduleUpdate(**changes), version))

    async def delete(self, schedule: str) -> None:
        await self._send(calls.delete_schedule(schedule))

    async def suspend(self, schedule: str) -> ScheduleView:
        return await self._send(calls.suspend_schedule(schedule))

    async def resume(self, schedule: str) -> ScheduleView:
        return await self._send(calls.resume_schedule(schedule))

    async def trigger(self, schedule: str) -> ScheduleRunView:
        return await self._send(calls.trigger_schedule(schedule))

    def runs(self, schedule: str) -> AsyncIterator[ScheduleRunView]:
        return self._every(lambda cursor: calls.page_schedule_runs(schedule, cursor=cursor, limit=200))
