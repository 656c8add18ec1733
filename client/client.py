"""The synchronous client. `AsyncClient` in asynchronous.py is the same with `await`."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import httpx

from client import calls
from client.calls import Call
from client.discovery import options_from
from client.errors import ApiError, ClientError, UnreachableError
from client.events import EVENTS, LOGS, Numbered, Stream, Tail
from client.folders import ModelFolder, plain_name, read_model_folder
from client.transfers import UNWATCHED, Meter, Transfers, choose_artifacts, target_of, url_of
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
    JobSpec,
    JobView,
    LatestView,
    LogView,
    ModelCreate,
    ModelView,
    Page,
    ReadyView,
    RecipeView,
    ReportView,
    ScheduleCreate,
    ScheduleRunView,
    ScheduleUpdate,
    ScheduleView,
    UploadFile,
    WorkerView,
)

Answer = TypeVar("Answer")
Item = TypeVar("Item")
NumberedItem = TypeVar("NumberedItem", bound=Numbered)


class Client:
    """A connection to one Nightpress API, to be closed or used with `with`. Safe to share between threads.

    >>> with Client() as nightpress:
    ...     model = nightpress.models.upload(Path("all-minilm-l6-v2"))
    ...     job = nightpress.jobs.wait(nightpress.jobs.submit(model.id, "int8-encoder").id)
    ...     nightpress.jobs.download(job.id, Path("pressed"))
    """

    def __init__(
        self, api_url: str | None = None, api_key: str | None = None, *, timeout_s: float = 30.0, retries: int = 3
    ) -> None:
        self.options = options_from(api_url, api_key, timeout_s, retries)
        self.http = httpx.Client(**self.options.http_options())
        self.models = Models(self)
        self.data_sets = DataSets(self)
        self.recipes = Recipes(self)
        self.jobs = Jobs(self)
        self.schedules = Schedules(self)

    def send(self, call: Call[Answer]) -> Answer:
        """Make one request of `client.calls`, with retries. Raises ApiError or UnreachableError."""
        attempts = Attempts(self.options, repeatable=call.repeatable, accept=call.accept)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self.http.request(**self.options.request(call))
            except httpx.TransportError as error:
                outcome = error
            pause = attempts.pause_after(outcome)
            if pause is None:
                return read_answer(call, self.options, outcome)
            time.sleep(pause)

    def workers(self) -> list[WorkerView]:
        return self.send(calls.list_workers())

    def ready(self) -> ReadyView:
        """What the API says of the parts it needs; needs no key."""
        return self.send(calls.ready())

    def me(self) -> dict[str, Any]:
        """Whom the key belongs to and what it allows."""
        return self.send(calls.me())

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Resource:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._send = client.send

    def _every(self, page_of: Callable[[str | None], Call[Page[Item]]]) -> Iterator[Item]:
        cursor: str | None = None
        while True:
            page = self._send(page_of(cursor))
            yield from page.items
            if not (cursor := page.next_cursor):
                return


class Models(_Resource):
    """Models: immutable folders with a digest."""

    def list(self, *, cursor: str | None = None, limit: int = 50) -> Page[ModelView]:
        return self._send(calls.page_models(cursor=cursor, limit=limit))

    def iterate(self) -> Iterator[ModelView]:
        """All, newest first, asking for the next page as it is needed."""
        return self._every(lambda cursor: calls.page_models(cursor=cursor, limit=200))

    def get(self, model: str) -> ModelView:
        return self._send(calls.get_model(model))

    def latest(self, model: str) -> LatestView:
        """The newest accepted result of a model's name. Raises ApiError(not_found) where none was accepted yet."""
        return self._send(calls.latest_of(model))

    def delete(self, model: str) -> None:
        self._send(calls.delete_model(model))

    def register(self, path: str, name: str | None = None) -> ModelView:
        """Use a folder on the server in place. Raises ApiError(path_not_allowed) where its operator hasn't allowed it."""
        name = name or plain_name(Path(path).name)
        return self._send(calls.create_model(ModelCreate(name=name, path=path)))

    def upload(
        self,
        folder: Path | ModelFolder,
        name: str | None = None,
        *,
        meter: Meter = UNWATCHED,
        stop: threading.Event | None = None,
    ) -> ModelView:
        """Send a local folder. The same bytes under the same name are never sent twice: a ready model is reused, a broken upload continued."""
        chosen = folder if isinstance(folder, ModelFolder) else read_model_folder(folder, name)
        transfers = Transfers(self._client.http, self._client.options, meter, stop=stop or threading.Event())
        announced = transfers.hash_files(chosen.files)
        wanted = {(file.path, file.size, file.sha256) for file in announced}
        model = next(
            (
                one
                for one in self.iterate()
                if one.name == chosen.name
                and one.state != "failed"
                and {(file.path, file.size, file.sha256) for file in one.files} == wanted
            ),
            None,
        )
        if model is None:
            model = self._send(calls.create_model(ModelCreate(name=chosen.name, files=announced)))
        if model.state == "uploading":
            _send_files(self._client, transfers, "models", model.id, model.uploads, chosen.files)
            model = self.get(model.id)
        return model


class DataSets(_Resource):
    """Data sets: one immutable file of prose or of labelled rows."""

    def list(self, *, cursor: str | None = None, limit: int = 50) -> Page[DataSetView]:
        return self._send(calls.page_data_sets(cursor=cursor, limit=limit))

    def iterate(self) -> Iterator[DataSetView]:
        return self._every(lambda cursor: calls.page_data_sets(cursor=cursor, limit=200))

    def get(self, data_set: str) -> DataSetView:
        return self._send(calls.get_data_set(data_set))

    def delete(self, data_set: str) -> None:
        self._send(calls.delete_data_set(data_set))

    def register(self, path: str, name: str | None = None) -> DataSetView:
        name = name or plain_name(Path(path).name.split(".")[0])
        return self._send(calls.create_data_set(DataSetCreate(name=name, path=path)))

    def upload(
        self,
        file: Path,
        name: str | None = None,
        *,
        meter: Meter = UNWATCHED,
        stop: threading.Event | None = None,
    ) -> DataSetView:
        """Send a local file: `.txt` or `.jsonl`, plain or `.gz`."""
        if not file.is_file():
            raise ClientError(f"{file} is not a file.", hint="A data set is one .txt or .jsonl file, plain or .gz.")
        transfers = Transfers(self._client.http, self._client.options, meter, stop=stop or threading.Event())
        [announced] = transfers.hash_files({file.name: file})
        request = DataSetCreate(name=name or plain_name(file.name.split(".")[0]), file=announced)
        data_set = self._send(calls.create_data_set(request))
        if data_set.state == "uploading":
            _send_files(self._client, transfers, "datasets", data_set.id, data_set.uploads, {file.name: file})
            data_set = self.get(data_set.id)
        return data_set


def _send_files(
    client: Client,
    transfers: Transfers,
    kind: str,
    subject: str,
    files: Sequence[UploadFile],
    sources: Mapping[str, Path],
) -> None:
    """Send the parts the server lacks and close the upload."""

    def missing() -> Sequence[UploadFile]:
        return client.send(calls.uploads(kind, subject))

    transfers.upload(files or missing(), sources, missing)
    try:
        client.send(calls.complete(kind, subject))
    except UnreachableError:
        # The answer was lost, perhaps not the request: asking what came of it is safe, completing twice is not.
        if client.send(calls.upload_state(kind, subject)) != "ready":
            raise


class Recipes(_Resource):
    """Recipes: what to do with a model."""

    def list(self) -> list[RecipeView]:
        return self._send(calls.list_recipes())

    def get(self, name: str) -> RecipeView:
        return self._send(calls.get_recipe(name))

    def validate(self, recipe: dict[str, Any] | str, model: str | None = None) -> Plan:
        """The plan, estimate and warnings for a recipe given as a mapping or YAML text. Raises ApiError(invalid_recipe)."""
        return self._send(calls.validate_recipe(recipe, model))


class Jobs(_Resource):
    """Jobs: one recipe on one model."""

    def submit(
        self, model: str, recipe: str | dict[str, Any], *, idempotency_key: str | None = None, **fields: Any
    ) -> JobView:
        """Queue a job. `fields`: those of core.schemas.JobCreate (name, priority, labels, run_after, …).

        The request carries a fresh Idempotency-Key, so that a retry over a bad line makes no second job; give your own to extend
        that over several runs of a program.
        """
        return self._send(calls.submit_job(JobCreate(model=model, recipe=recipe, **fields), idempotency_key))

    def list(
        self,
        *,
        states: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
        model: str | None = None,
        cursor: str | None = None,
        limit: int = 50,
    ) -> Page[JobView]:
        return self._send(calls.page_jobs(states=states, labels=labels, model=model, cursor=cursor, limit=limit))

    def iterate(
        self, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None, model: str | None = None
    ) -> Iterator[JobView]:
        return self._every(
            lambda cursor: calls.page_jobs(states=states, labels=labels, model=model, cursor=cursor, limit=200)
        )

    def get(self, job_id: str) -> JobView:
        return self._send(calls.get_job(job_id))

    def cancel(self, job_id: str) -> JobView:
        return self._send(calls.cancel_job(job_id))

    def retry(self, job_id: str) -> JobView:
        """A new job like a finished one."""
        return self._send(calls.retry_job(job_id))

    def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 1.0,
        patience_s: float = 120.0,
        on_update: Callable[[JobView], None] | None = None,
    ) -> JobView:
        """Return the job once it is over, whatever its end. A server that is away for less than `patience_s` is waited for.

        Raises TimeoutError after `timeout_s`; the job goes on.
        """
        pace = Pace(timeout_s, poll_s, patience_s)
        while True:
            try:
                job = self.get(job_id)
            except (UnreachableError, ApiError) as error:
                pause = pace.after_error(error)
            else:
                if on_update:
                    on_update(job)
                if job.state in TERMINAL_STATES:
                    return job
                pause = pace.after(job)
            time.sleep(pause)

    def events(self, job_id: str, *, after: int = 0, patience_s: float = 120.0) -> Iterator[EventView]:
        """A job's history as it grows, until the job is over. Reconnects, skipping and repeating nothing."""
        return self._follow(EVENTS, job_id, after, patience_s)

    def past_events(self, job_id: str, *, after: int = 0, limit: int = 500) -> Sequence[EventView]:
        return self._send(calls.list_events(job_id, after=after, limit=limit))

    def logs(
        self, job_id: str, *, after: int = 0, follow: bool = False, patience_s: float = 120.0
    ) -> Iterator[LogView]:
        """A job's log: what there is, and with `follow` what comes, until the job is over."""
        if follow:
            yield from self._follow(LOGS, job_id, after, patience_s)
            return
        while lines := self._send(calls.list_logs(job_id, after=after)):
            yield from lines
            after = lines[-1].seq

    def _follow(
        self, stream: Stream[NumberedItem], job_id: str, after: int, patience_s: float
    ) -> Iterator[NumberedItem]:
        tail = Tail(self._client.options, stream, job_id, after, patience_s)
        while True:
            error: httpx.TransportError | ApiError | None = None
            with ExitStack() as stack:
                try:
                    response = stack.enter_context(self._client.http.stream(**tail.request()))
                    if response.status_code >= 400:
                        response.read()
                        raise ApiError.from_response(response)
                    for line in response.iter_lines():
                        if (item := tail.feed(line)) is not None:
                            yield item
                except (httpx.TransportError, ApiError) as caught:
                    error = caught
            if error is not None:
                time.sleep(tail.pause_after(error))
            elif self.get(job_id).state in TERMINAL_STATES:
                while rest := self._send(tail.rest()):
                    yield from (item for item in rest if tail.seen(item) is not None)
                return

    def artifacts(self, job_id: str) -> Sequence[ArtifactView]:
        return self._send(calls.list_artifacts(job_id))

    def report(self, job_id: str) -> ReportView:
        return self._send(calls.get_report(job_id))

    def drawn_report(self, job_id: str, form: Literal["html", "md"]) -> str:
        """The report as one self-contained page or as a Markdown model card."""
        return self._send(calls.get_drawn_report(job_id, form))

    def download(
        self,
        job_id: str,
        folder: Path,
        *,
        formats: Sequence[str] = (),
        meter: Meter = UNWATCHED,
        stop: threading.Event | None = None,
    ) -> Sequence[Path]:
        """Fetch a job's artifacts to `folder`/<format>/ and return those folders. Continues what an earlier call left half done.

        Every file's SHA-256 is checked before it gets its name. Raises TransferError where one differs.
        """
        artifacts = choose_artifacts(self.artifacts(job_id), formats, job_id)
        wanted = [
            (url_of(one.download_url, file.path), file.model_copy(update={"path": f"{one.format}/{file.path}"}))
            for one in artifacts
            for file in one.files
        ]
        transfers = Transfers(self._client.http, self._client.options, meter, stop=stop or threading.Event())
        transfers.download(wanted, folder)
        return [target_of(folder, one.format) for one in artifacts]


class Schedules(_Resource):
    """Schedules: jobs that come again. `schedule`: an id or a name."""

    def create(
        self, name: str, cron: str, model: str, recipe: str | dict[str, Any], *, timezone: str = "UTC", **fields: Any
    ) -> ScheduleView:
        """`fields`: those of core.schemas.ScheduleCreate (overlap, catch_up, only_if_changed, suspended) and of JobSpec."""
        request = schedule_of(name, cron, model, recipe, timezone, fields)
        return self._send(calls.create_schedule(request))

    def get(self, schedule: str) -> ScheduleView:
        return self._send(calls.get_schedule(schedule))

    def iterate(self) -> Iterator[ScheduleView]:
        return self._every(lambda cursor: calls.page_schedules(cursor=cursor, limit=200))

    def edit(self, schedule: str, *, version: int | None = None, **changes: Any) -> ScheduleView:
        """Change what is given. With `version`, only while it is still that one: else ApiError(precondition_failed)."""
        return self._send(calls.edit_schedule(schedule, ScheduleUpdate(**changes), version))

    def delete(self, schedule: str) -> None:
        self._send(calls.delete_schedule(schedule))

    def suspend(self, schedule: str) -> ScheduleView:
        return self._send(calls.suspend_schedule(schedule))

    def resume(self, schedule: str) -> ScheduleView:
        return self._send(calls.resume_schedule(schedule))

    def trigger(self, schedule: str) -> ScheduleRunView:
        """Fire now. The run's job appears within a few seconds."""
        return self._send(calls.trigger_schedule(schedule))

    def runs(self, schedule: str) -> Iterator[ScheduleRunView]:
        """What each fire came to, newest first."""
        return self._every(lambda cursor: calls.page_schedule_runs(schedule, cursor=cursor, limit=200))


def schedule_of(
    name: str, cron: str, model: str, recipe: str | dict[str, Any], timezone: str, fields: Mapping[str, Any]
) -> ScheduleCreate:
    """A request from plain arguments: those of the job go into the job."""
    own = {key: value for key, value in fields.items() if key in ScheduleCreate.model_fields}
    rest = {key: value for key, value in fields.items() if key not in own}
    return ScheduleCreate(
        name=name, cron=cron, timezone=timezone, job=JobSpec(model=model, recipe=recipe, **rest), **own
    )
