"""The asynchronous client: client.py with `await`. Requests come from client.calls, transfers run in threads with the synchronous code."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx

from nightpress.client import access, calls
from nightpress.client.asking import AsksAsync, AsyncResource, PagesAsync
from nightpress.client.calls import Call
from nightpress.client.client import Client
from nightpress.client.errors import ApiError, UnreachableError
from nightpress.client.events import EVENTS, LOGS, Numbered, Stream, Tail
from nightpress.client.folders import plain_name
from nightpress.client.transfers import UNWATCHED, Meter
from nightpress.client.transport import attempts_at, read_answer
from nightpress.client.waiting import Pace
from nightpress.core.wire.jobs import TERMINAL_STATES, EventView, JobView, LogView
from nightpress.core.wire.models import DataSetCreate, DataSetView, ModelCreate, ModelView
from nightpress.core.wire.system import MeView, QueueView, ReadyView, WorkerView

Answer = TypeVar("Answer")
Item = TypeVar("Item")
NumberedItem = TypeVar("NumberedItem", bound=Numbered)


class AsyncClient:
    """As `client.Client`, for an event loop. To be closed with `aclose()` or used with `async with`."""

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        profile: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 3,
    ) -> None:
        self.blocking = Client(api_url, api_key, profile=profile, timeout_s=timeout_s, retries=retries)
        self.options = self.blocking.options
        self.http = httpx.AsyncClient(**self.options.http_options())
        self.models = AsyncModels(self)
        self.data_sets = AsyncDataSets(self)
        self.recipes = AsyncRecipes(self)
        self.jobs = AsyncJobs(self)
        self.schedules = AsyncSchedules(self)
        self.webhooks = AsyncWebhooks(self)
        self.keys = AsyncKeys(self)
        self.tenants = AsyncTenants(self)

    async def send(self, call: Call[Answer]) -> Answer:
        """Make one request of `client.calls`, with retries. Raises ApiError or UnreachableError."""
        attempts = attempts_at(call, self.options)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self.http.request(**self.options.request(call))
            except httpx.TransportError as error:
                outcome = error
            pause = attempts.pause_after(outcome)
            if pause is None:
                return read_answer(call, self.options, outcome, answer_lost=attempts.answer_lost)
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

    async def queues(self) -> list[QueueView]:
        return await self.send(calls.list_queues())

    async def me(self) -> MeView:
        return await self.send(access.me())

    async def aclose(self) -> None:
        self.blocking.close()
        await self.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class AsyncModels(AsyncResource):
    list = AsksAsync(calls.page_models)
    iterate = PagesAsync(calls.page_models)
    get = AsksAsync(calls.get_model)
    delete = AsksAsync(calls.delete_model)
    latest = AsksAsync(calls.latest_of)
    promote = AsksAsync(calls.promote)
    promotions = PagesAsync(calls.page_promotions)

    async def fetch(self, source: str, name: str) -> ModelView:
        return await self._send(calls.create_model(ModelCreate(name=name, source=source)))

    async def wait(
        self, model: str, *, poll_s: float = 1.0, on_update: Callable[[ModelView], None] | None = None
    ) -> ModelView:
        while True:
            one = await self.get(model)
            if on_update:
                on_update(one)
            if one.state not in {"fetching", "verifying"}:
                return one
            await asyncio.sleep(poll_s)

    async def register(self, path: str, name: str | None = None) -> ModelView:
        name = name or plain_name(Path(path).name)
        return await self._send(calls.create_model(ModelCreate(name=name, path=path)))

    async def upload(self, folder: Path, name: str | None = None, *, meter: Meter = UNWATCHED) -> ModelView:
        models = self._client.blocking.models
        return await self._client.in_thread(lambda stop: models.upload(folder, name, meter=meter, stop=stop))


class AsyncDataSets(AsyncResource):
    list = AsksAsync(calls.page_data_sets)
    iterate = PagesAsync(calls.page_data_sets)
    get = AsksAsync(calls.get_data_set)
    delete = AsksAsync(calls.delete_data_set)

    async def fetch(self, source: str, name: str) -> DataSetView:
        return await self._send(calls.create_data_set(DataSetCreate(name=name, source=source)))

    async def wait(
        self, data_set: str, *, poll_s: float = 1.0, on_update: Callable[[DataSetView], None] | None = None
    ) -> DataSetView:
        while True:
            one = await self.get(data_set)
            if on_update:
                on_update(one)
            if one.state not in {"fetching", "verifying"}:
                return one
            await asyncio.sleep(poll_s)

    async def register(self, path: str, name: str | None = None) -> DataSetView:
        name = name or plain_name(Path(path).name.split(".")[0])
        return await self._send(calls.create_data_set(DataSetCreate(name=name, path=path)))

    async def upload(self, file: Path, name: str | None = None, *, meter: Meter = UNWATCHED) -> DataSetView:
        data_sets = self._client.blocking.data_sets
        return await self._client.in_thread(lambda stop: data_sets.upload(file, name, meter=meter, stop=stop))


class AsyncRecipes(AsyncResource):
    list = AsksAsync(calls.list_recipes)
    get = AsksAsync(calls.get_recipe)
    validate = AsksAsync(calls.validate_recipe)
    schema = AsksAsync(calls.recipe_schema)


class AsyncJobs(AsyncResource):
    submit = AsksAsync(calls.submit_job)
    submit_all = AsksAsync(calls.submit_jobs)
    list = AsksAsync(calls.page_jobs)
    iterate = PagesAsync(calls.page_jobs)
    get = AsksAsync(calls.get_job)
    cancel = AsksAsync(calls.cancel_job)
    cancel_all = AsksAsync(calls.cancel_jobs)
    retry = AsksAsync(calls.retry_job)
    artifacts = AsksAsync(calls.list_artifacts)
    report = AsksAsync(calls.get_report)
    drawn_report = AsksAsync(calls.get_drawn_report)

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

    def past_events(self, job_id: str, *, after: int = 0) -> AsyncIterator[EventView]:
        return self._past(EVENTS, job_id, after)

    def events(self, job_id: str, *, after: int = 0, patience_s: float = 120.0) -> AsyncIterator[EventView]:
        return self._follow(EVENTS, job_id, after, patience_s)

    async def logs(
        self, job_id: str, *, after: int = 0, follow: bool = False, patience_s: float = 120.0
    ) -> AsyncIterator[LogView]:
        if follow:
            async for line in self._follow(LOGS, job_id, after, patience_s):
                yield line
            return
        async for line in self._past(LOGS, job_id, after):
            yield line

    async def _past(self, stream: Stream[NumberedItem], job_id: str, after: int) -> AsyncIterator[NumberedItem]:
        while items := await self._send(stream.page(job_id, after=after)):
            for item in items:
                yield item
            after = items[-1].seq

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

    async def download(
        self, job_id: str, folder: Path, *, formats: Sequence[str] = (), meter: Meter = UNWATCHED
    ) -> Sequence[Path]:
        jobs = self._client.blocking.jobs
        return await self._client.in_thread(
            lambda stop: jobs.download(job_id, folder, formats=formats, meter=meter, stop=stop)
        )


class AsyncSchedules(AsyncResource):
    create = AsksAsync(calls.create_schedule)
    iterate = PagesAsync(calls.page_schedules)
    get = AsksAsync(calls.get_schedule)
    edit = AsksAsync(calls.edit_schedule)
    delete = AsksAsync(calls.delete_schedule)
    suspend = AsksAsync(calls.suspend_schedule)
    resume = AsksAsync(calls.resume_schedule)
    trigger = AsksAsync(calls.trigger_schedule)
    runs = PagesAsync(calls.page_schedule_runs)


class AsyncWebhooks(AsyncResource):
    create = AsksAsync(access.create_webhook)
    iterate = PagesAsync(access.page_webhooks)
    get = AsksAsync(access.get_webhook)
    edit = AsksAsync(access.edit_webhook)
    delete = AsksAsync(access.delete_webhook)
    rotate = AsksAsync(access.rotate_secret)
    test = AsksAsync(access.send_test)
    deliveries = PagesAsync(access.page_deliveries)
    delivery = AsksAsync(access.get_delivery)
    redeliver = AsksAsync(access.redeliver)


class AsyncKeys(AsyncResource):
    create = AsksAsync(access.create_key)
    iterate = PagesAsync(access.page_keys)
    get = AsksAsync(access.get_key)
    rotate = AsksAsync(access.rotate_key)
    revoke = AsksAsync(access.revoke_key)


class AsyncTenants(AsyncResource):
    iterate = PagesAsync(access.page_tenants)
    get = AsksAsync(access.get_tenant)
    set_quotas = AsksAsync(access.set_quotas)
    audit = PagesAsync(access.page_audit)
