"""The synchronous client. `AsyncClient` in asynchronous.py is the same with `await`."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx

from nightpress.client import access, calls
from nightpress.client.asking import Asks, Pages, Resource
from nightpress.client.calls import Call
from nightpress.client.discovery import options_from
from nightpress.client.errors import ApiError, ClientError, UnreachableError
from nightpress.client.events import EVENTS, LOGS, Numbered, Stream, Tail
from nightpress.client.folders import ModelFolder, plain_name, read_model_folder
from nightpress.client.transfers import UNWATCHED, Meter, Transfers, choose_artifacts, target_of, url_of
from nightpress.client.transport import attempts_at, read_answer
from nightpress.client.waiting import Pace
from nightpress.core.wire.jobs import TERMINAL_STATES, EventView, JobView, LogView
from nightpress.core.wire.models import DataSetCreate, DataSetView, ModelCreate, ModelView, UploadFile
from nightpress.core.wire.system import MeView, QueueView, ReadyView, WorkerView

Answer = TypeVar("Answer")
Item = TypeVar("Item")
NumberedItem = TypeVar("NumberedItem", bound=Numbered)


_LOOK_AGAIN_S = 1.0  #: how often a large upload is asked whether it is verified


class Client:
    """A connection to one Nightpress API, to be closed or used with `with`. Safe to share between threads.

    `profile`: a server that `nightpress servers add` named. With nothing given, it is found as the command line finds it.

    >>> with Client() as nightpress:
    ...     model = nightpress.models.upload(Path("all-minilm-l6-v2"))
    ...     job = nightpress.jobs.wait(nightpress.jobs.submit(model.id, "int8-encoder").id)
    ...     nightpress.jobs.download(job.id, Path("pressed"))
    """

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        profile: str | None = None,
        timeout_s: float = 30.0,
        retries: int = 3,
    ) -> None:
        self.options = options_from(api_url, api_key, profile, timeout_s=timeout_s, retries=retries)
        self.http = httpx.Client(**self.options.http_options())
        self.models = Models(self)
        self.data_sets = DataSets(self)
        self.recipes = Recipes(self)
        self.jobs = Jobs(self)
        self.schedules = Schedules(self)
        self.webhooks = Webhooks(self)
        self.keys = Keys(self)
        self.tenants = Tenants(self)

    def send(self, call: Call[Answer]) -> Answer:
        """Make one request of `client.calls`, with retries. Raises ApiError or UnreachableError."""
        attempts = attempts_at(call, self.options)
        while True:
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self.http.request(**self.options.request(call))
            except httpx.TransportError as error:
                outcome = error
            pause = attempts.pause_after(outcome)
            if pause is None:
                return read_answer(call, self.options, outcome, answer_lost=attempts.answer_lost)
            time.sleep(pause)

    def workers(self) -> list[WorkerView]:
        return self.send(calls.list_workers())

    def queues(self) -> list[QueueView]:
        """What waits and what runs, over all tenants."""
        return self.send(calls.list_queues())

    def ready(self) -> ReadyView:
        """What the API says of the parts it needs; needs no key."""
        return self.send(calls.ready())

    def me(self) -> MeView:
        """Whom the key belongs to, what it allows, and what its tenant uses of its quotas."""
        return self.send(access.me())

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Models(Resource):
    """Models: immutable folders with a digest."""

    list = Asks(calls.page_models)
    iterate = Pages(calls.page_models)
    get = Asks(calls.get_model)
    delete = Asks(calls.delete_model)
    latest = Asks(calls.latest_of)
    promote = Asks(calls.promote)
    promotions = Pages(calls.page_promotions)

    def fetch(self, source: str, name: str) -> ModelView:
        """Have the server fetch it from `s3://…` or `hf://…`, where its operator allows that. It goes on by itself: see `wait`."""
        return self._send(calls.create_model(ModelCreate(name=name, source=source)))

    def wait(
        self, model: str, *, poll_s: float = 1.0, on_update: Callable[[ModelView], None] | None = None
    ) -> ModelView:
        """Until it is ready or failed: large ones are fetched and verified beside the request."""
        while True:
            one = self.get(model)
            if on_update:
                on_update(one)
            if one.state not in {"fetching", "verifying"}:
                return one
            time.sleep(poll_s)

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
        """Send a local folder, so that its name means these bytes afterwards.

        Where the name means them already nothing is sent, and a broken upload is continued.
        """
        chosen = folder if isinstance(folder, ModelFolder) else read_model_folder(folder, name)
        transfers = Transfers(self._client.http, self._client.options, meter, stop=stop or threading.Event())
        announced = transfers.hash_files(chosen.files)
        wanted = {(file.path, file.size, file.sha256) for file in announced}
        model = self._there(chosen.name, wanted)
        if model is None:
            model = self._send(calls.create_model(ModelCreate(name=chosen.name, files=announced)))
        if model.state == "uploading":
            _send_files(self._client, transfers, "models", model.id, model.uploads, chosen.files)
            model = self.get(model.id)
        return model

    def _there(self, name: str, wanted: Collection[tuple[str, int, str]]) -> ModelView | None:
        """The model of this name with these files (path, size, SHA-256), unless the name means a newer one by now."""
        for model in self.iterate():
            if model.name == name and model.state != "failed":
                if {(file.path, file.size, file.sha256) for file in model.files} == wanted:
                    return model
                if model.state == "ready":
                    return None
        return None


class DataSets(Resource):
    """Data sets: one immutable file of prose or of labelled rows."""

    list = Asks(calls.page_data_sets)
    iterate = Pages(calls.page_data_sets)
    get = Asks(calls.get_data_set)
    delete = Asks(calls.delete_data_set)

    def fetch(self, source: str, name: str) -> DataSetView:
        """Have the server fetch it from `s3://…` or `hf://…`, where its operator allows that. It goes on by itself: see `wait`."""
        return self._send(calls.create_data_set(DataSetCreate(name=name, source=source)))

    def wait(
        self, data_set: str, *, poll_s: float = 1.0, on_update: Callable[[DataSetView], None] | None = None
    ) -> DataSetView:
        """Until it is ready or failed: large ones are fetched and verified beside the request."""
        while True:
            one = self.get(data_set)
            if on_update:
                on_update(one)
            if one.state not in {"fetching", "verifying"}:
                return one
            time.sleep(poll_s)

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
        if client.send(calls.upload_state(kind, subject)) not in {"ready", "verifying"}:
            raise
    while client.send(calls.upload_state(kind, subject)) == "verifying":
        time.sleep(_LOOK_AGAIN_S)


class Recipes(Resource):
    """Recipes: what to do with a model."""

    list = Asks(calls.list_recipes)
    get = Asks(calls.get_recipe)
    validate = Asks(calls.validate_recipe)
    schema = Asks(calls.recipe_schema)


class Jobs(Resource):
    """Jobs: one recipe on one model."""

    submit = Asks(calls.submit_job)
    submit_all = Asks(calls.submit_jobs)
    list = Asks(calls.page_jobs)
    iterate = Pages(calls.page_jobs)
    get = Asks(calls.get_job)
    cancel = Asks(calls.cancel_job)
    cancel_all = Asks(calls.cancel_jobs)
    retry = Asks(calls.retry_job)
    artifacts = Asks(calls.list_artifacts)
    report = Asks(calls.get_report)
    drawn_report = Asks(calls.get_drawn_report)

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

    def past_events(self, job_id: str, *, after: int = 0) -> Iterator[EventView]:
        """A job's history up to now, however long it is."""
        return self._past(EVENTS, job_id, after)

    def events(self, job_id: str, *, after: int = 0, patience_s: float = 120.0) -> Iterator[EventView]:
        """A job's history as it grows, until the job is over. Reconnects, skipping and repeating nothing."""
        return self._follow(EVENTS, job_id, after, patience_s)

    def logs(
        self, job_id: str, *, after: int = 0, follow: bool = False, patience_s: float = 120.0
    ) -> Iterator[LogView]:
        """A job's log: what there is, and with `follow` what comes, until the job is over."""
        if follow:
            yield from self._follow(LOGS, job_id, after, patience_s)
            return
        yield from self._past(LOGS, job_id, after)

    def _past(self, stream: Stream[NumberedItem], job_id: str, after: int) -> Iterator[NumberedItem]:
        while items := self._send(stream.page(job_id, after=after)):
            yield from items
            after = items[-1].seq

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


class Schedules(Resource):
    """Schedules: jobs that come again. `schedule`: an id or a name."""

    create = Asks(calls.create_schedule)
    iterate = Pages(calls.page_schedules)
    get = Asks(calls.get_schedule)
    edit = Asks(calls.edit_schedule)
    delete = Asks(calls.delete_schedule)
    suspend = Asks(calls.suspend_schedule)
    resume = Asks(calls.resume_schedule)
    trigger = Asks(calls.trigger_schedule)
    runs = Pages(calls.page_schedule_runs)


class Webhooks(Resource):
    """Webhooks: who is told when a job has ended."""

    create = Asks(access.create_webhook)
    iterate = Pages(access.page_webhooks)
    get = Asks(access.get_webhook)
    edit = Asks(access.edit_webhook)
    delete = Asks(access.delete_webhook)
    rotate = Asks(access.rotate_secret)
    test = Asks(access.send_test)
    deliveries = Pages(access.page_deliveries)
    delivery = Asks(access.get_delivery)
    redeliver = Asks(access.redeliver)


class Keys(Resource):
    """API keys: of one's own tenant, and for administrators of any."""

    create = Asks(access.create_key)
    iterate = Pages(access.page_keys)
    get = Asks(access.get_key)
    rotate = Asks(access.rotate_key)
    revoke = Asks(access.revoke_key)


class Tenants(Resource):
    """Tenants, their quotas and use, and what their keys did: for administrators."""

    iterate = Pages(access.page_tenants)
    get = Asks(access.get_tenant)
    set_quotas = Asks(access.set_quotas)
    audit = Pages(access.page_audit)
