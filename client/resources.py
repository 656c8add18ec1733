"""What both clients can do, by resource: `Client` has them with the blocking driver, `AsyncClient` with the event loop's."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from nightpress.client import access, calls, delivery_calls, schedule_calls
from nightpress.client.discovery import options_from
from nightpress.client.drivers import Blocking
from nightpress.client.errors import ApiError, UnreachableError
from nightpress.client.events import EVENTS, LOGS
from nightpress.client.flows import Flow, Listing, Pause
from nightpress.client.methods import Driver, Resource, ask, flow, listing, pages, transfer
from nightpress.client.registered import DataSets, Models
from nightpress.client.studies import Studies
from nightpress.client.tailing import follow_lines, past_lines
from nightpress.client.transfers import UNWATCHED, Meter, Transfers, choose_artifacts, target_of, url_of
from nightpress.client.transport import Options
from nightpress.client.waiting import Pace
from nightpress.core.errors import ErrorCode
from nightpress.core.handoff.manifest import ATTESTATION_FILE
from nightpress.core.wire.jobs import TERMINAL_STATES, EventView, JobView, LogView


class Recipes(Resource[Driver]):
    """Recipes: what to do with a model."""

    list = ask(calls.list_recipes)
    get = ask(calls.get_recipe)
    validate = ask(calls.validate_recipe)
    schema = ask(calls.recipe_schema)
    passes = ask(calls.list_passes)


class Jobs(Resource[Driver]):
    """Jobs: one recipe on one model."""

    submit = ask(calls.submit_job)
    submit_all = ask(calls.submit_jobs)
    list = ask(calls.page_jobs)
    iterate = pages(calls.page_jobs)
    get = ask(calls.get_job)
    cancel = ask(calls.cancel_job)
    cancel_all = ask(calls.cancel_jobs)
    retry = ask(calls.retry_job)
    artifacts = ask(calls.list_artifacts)
    trackers = ask(calls.list_job_trackers)
    report = ask(calls.get_report)
    cost = ask(calls.get_cost)
    drawn_report = ask(calls.get_drawn_report)
    report_file = ask(delivery_calls.get_report_file)
    attestation = ask(delivery_calls.get_attestation)

    @flow
    def wait(
        self,
        job_id: str,
        *,
        timeout_s: float | None = None,
        poll_s: float = 1.0,
        patience_s: float = 120.0,
        on_update: Callable[[JobView], None] | None = None,
    ) -> Flow[JobView]:
        """Return the job once it has succeeded, failed or been cancelled. `on_update` is called with each answer until then.

        Raises TimeoutError after `timeout_s`, while the job goes on. Raises UnreachableError or ApiError where the server
        has been away for more than `patience_s`.
        """
        pace = Pace(timeout_s, poll_s, patience_s)
        while True:
            try:
                job = yield from self._ask(calls.get_job(job_id))
            except (UnreachableError, ApiError) as error:
                pause = pace.after_error(error)
            else:
                if on_update:
                    on_update(job)
                if job.state in TERMINAL_STATES:
                    return job
                pause = pace.after("Job", job.id, job.state)
            yield Pause(pause)

    @listing
    def past_events(self, job_id: str, *, after: int = 0) -> Listing[EventView]:
        """A job's events up to now, from number `after` + 1 on."""
        yield from past_lines(self, EVENTS, job_id, after)

    @listing
    def events(self, job_id: str, *, after: int = 0, patience_s: float = 120.0) -> Listing[EventView]:
        """A job's events as they come, until the job is over. A broken connection neither skips nor repeats an event.

        Raises UnreachableError or ApiError where the server has been away for more than `patience_s`.
        """
        yield from follow_lines(self, EVENTS, job_id, after, patience_s, lambda: calls.get_job(job_id))

    @listing
    def logs(self, job_id: str, *, after: int = 0, follow: bool = False, patience_s: float = 120.0) -> Listing[LogView]:
        """A job's log up to now; with `follow`, also the lines that come until the job is over, as `events` does."""
        if follow:
            yield from follow_lines(self, LOGS, job_id, after, patience_s, lambda: calls.get_job(job_id))
        else:
            yield from past_lines(self, LOGS, job_id, after)

    @transfer
    def download(
        self: "Jobs[Blocking]",
        job_id: str,
        folder: Path,
        *,
        formats: Sequence[str] = (),
        meter: Meter = UNWATCHED,
        stop: threading.Event | None = None,
    ) -> Sequence[Path]:
        """Fetch a job's artifacts with their signed statements to `folder`/<format>/ and return those folders. Continues what an earlier call left half done.

        A file gets its name when its SHA-256 is right. Setting `stop` ends the transfer. Raises TransferError where a
        file's bytes differ from the job's record, ClientError for a format that the job lacks, ApiError or UnreachableError.
        """
        artifacts = choose_artifacts(self.artifacts(job_id), formats, job_id)
        wanted = [
            (
                url_of(artifact.download_url, file.path),
                file.model_copy(update={"path": f"{artifact.format}/{file.path}"}),
            )
            for artifact in artifacts
            for file in artifact.files
        ]
        transfers = Transfers(self._driver.http, self._driver.options, meter, stop=stop or threading.Event())
        transfers.download(wanted, folder)
        for artifact in artifacts:
            if artifact.signed:
                self._fetch_attestation(job_id, artifact.format, folder / artifact.format / ATTESTATION_FILE)
        return [target_of(folder, artifact.format) for artifact in artifacts]

    def _fetch_attestation(self: "Jobs[Blocking]", job_id: str, artifact: str, target: Path) -> None:
        """Fetch a signed statement. Artifacts of earlier versions may have none."""
        try:
            bundle = self._driver.send(delivery_calls.get_attestation(job_id, artifact))
        except ApiError as error:
            if error.code != ErrorCode.NOT_FOUND:
                raise
        else:
            target.write_bytes(bundle)


class Schedules(Resource[Driver]):
    """Schedules: jobs that are submitted again and again. `schedule`: an id or a name."""

    create = ask(schedule_calls.create_schedule)
    iterate = pages(schedule_calls.page_schedules)
    get = ask(schedule_calls.get_schedule)
    edit = ask(schedule_calls.edit_schedule)
    delete = ask(schedule_calls.delete_schedule)
    suspend = ask(schedule_calls.suspend_schedule)
    resume = ask(schedule_calls.resume_schedule)
    trigger = ask(schedule_calls.trigger_schedule)
    runs = pages(schedule_calls.page_schedule_runs)


class Webhooks(Resource[Driver]):
    """Webhooks: addresses that are told when a job has ended."""

    create = ask(access.create_webhook)
    iterate = pages(access.page_webhooks)
    get = ask(access.get_webhook)
    edit = ask(access.edit_webhook)
    delete = ask(access.delete_webhook)
    rotate = ask(access.rotate_secret)
    test = ask(access.send_test)
    deliveries = pages(access.page_deliveries)
    delivery = ask(access.get_delivery)
    redeliver = ask(access.redeliver)


class Deliveries(Resource[Driver]):
    """Deliveries of accepted results to buckets, the Hub and registries."""

    create = ask(delivery_calls.deliver_result)
    iterate = pages(delivery_calls.page_result_deliveries)
    get = ask(delivery_calls.get_result_delivery)
    cancel = ask(delivery_calls.cancel_delivery)
    retry = ask(delivery_calls.retry_delivery)


class Credentials(Resource[Driver]):
    """What destinations are reached with. Secrets can be stored and replaced, but not read."""

    create = ask(delivery_calls.create_credential)
    iterate = pages(delivery_calls.page_credentials)
    get = ask(delivery_calls.get_credential)
    rotate = ask(delivery_calls.rotate_credential)
    delete = ask(delivery_calls.delete_credential)


class Keys(Resource[Driver]):
    """API keys: of the caller's tenant, and for administrators of any tenant."""

    create = ask(access.create_key)
    iterate = pages(access.page_keys)
    get = ask(access.get_key)
    rotate = ask(access.rotate_key)
    revoke = ask(access.revoke_key)


class Sessions(Resource[Driver]):
    """Sessions of people on the web page."""

    iterate = pages(access.page_sessions)
    end = ask(access.end_session)


class Tenants(Resource[Driver]):
    """Tenants, their quotas and use, and what their keys did: for administrators."""

    iterate = pages(access.page_tenants)
    get = ask(access.get_tenant)
    set_quotas = ask(access.set_quotas)
    audit = pages(access.page_audit)


class BaseClient(Resource[Driver]):
    """What both clients offer: the resources above, and calls about the service itself."""

    workers = ask(calls.list_workers)
    queues = ask(calls.list_queues)
    ready = ask(calls.ready)
    me = ask(access.me)
    signing_keys = ask(delivery_calls.list_signing_keys)
    costs = ask(access.get_spending)
    sign_in_provider = ask(access.sign_in_provider)

    _open: Callable[[Options], Driver]  #: makes the driver

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
        driver = self._open(self.options)
        super().__init__(driver)
        self.models = Models(driver)
        self.data_sets = DataSets(driver)
        self.recipes = Recipes(driver)
        self.jobs = Jobs(driver)
        self.schedules = Schedules(driver)
        self.studies = Studies(driver)
        self.webhooks = Webhooks(driver)
        self.deliveries = Deliveries(driver)
        self.credentials = Credentials(driver)
        self.keys = Keys(driver)
        self.sessions = Sessions(driver)
        self.tenants = Tenants(driver)
