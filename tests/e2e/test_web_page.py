"""The web page in a real browser, with a real API: jobs, schedules, models and comparisons. The tests act as the worker."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.service.jobs.records import Worker
from nightpress.core.service.trackers.store import TrackerStore
from nightpress.worker.offer import introduce
from tests.browser import DESKTOP, Browser, overflows, signed_in, violations
from tests.face import RECIPE, Face
from tests.jobs import GB, host
from tests.studies import StudyWorld

HOSTILE = "<img src=x onerror=\"document.title='taken'\"> nightly"
NARROW = {"width": 360, "height": 740}
VIEWS = (
    "/jobs",
    "/jobs/new",
    "/models",
    "/studies",
    "/schedules",
    "/workers",
    "/deliveries",
    "/webhooks",
    "/access",
    "/tenants",
    "/compare",
)


@pytest.fixture(scope="module")
def finished(face: Face, model_id: str) -> list[str]:
    """The ids of three jobs: accepted, rejected, failed."""
    with face.client() as client:
        ids = [client.jobs.submit(model_id, RECIPE, name=name).id for name in (HOSTILE, "second", "third")]
        face.succeed(face.claim())
        face.succeed(face.claim(), verdict="rejected")
        face.fail(face.claim(), NightpressError(ErrorCode.INVALID_DATA, "The text is <b>empty</b>.", hint="Add lines."))
    return ids


def settled(page: Any) -> None:
    """Wait until the view has all its answers and shows no "Loading"."""
    page.wait_for_load_state("networkidle")


@pytest.mark.parametrize(
    "look", [{"viewport": DESKTOP}, {"viewport": NARROW, "dark": True}], ids=["desktop", "phone, dark"]
)
def test_every_view_is_usable_by_all_and_asks_no_other_origin(
    browser: Browser, face: Face, finished: list[str], look: dict[str, Any]
):
    with face.client() as client, signed_in(browser, face, **look) as seen:
        page = seen.page
        wide = client.webhooks.create(f"http://127.0.0.1:9/{'longaddress/' * 12}", events=["job.failed"]).webhook
        for view in (
            *VIEWS,
            f"/webhooks/{wide.id}",
            f"/jobs/{finished[0]}",
            f"/jobs/{finished[2]}",
            f"/compare?job={finished[0]}&job={finished[1]}",
        ):
            page.wait_for_selector("h1")
            page.evaluate(f"location.hash = '#{view}'")
            expect(page).to_have_url(re.compile(f"#{re.escape(view)}$"))
            page.wait_for_timeout(300)
            settled(page) if not view.startswith("/jobs/job") else page.wait_for_selector(".log")
            assert violations(page) == [], view
            assert overflows(page) == [], view
            assert page.title().endswith("Nightpress"), view
        client.webhooks.delete(wide.id)
        assert {url.split("/")[2] for url in seen.requests if url.startswith("http")} == {face.url.split("/")[2]}
        assert seen.complaints == []


def test_a_study_shows_its_front_while_it_grows_and_then_what_it_found(browser: Browser, face: Face, bert_tiny: Path):
    world = StudyWorld(face.settings.data_dir, face.settings.sql_url, bert_tiny)
    study = world.create(trials=8, parallel=2, name=HOSTILE)
    control = world.replica()
    with signed_in(browser, face, "/studies") as seen:
        page = seen.page
        page.get_by_role("link", name=HOSTILE).click()
        page.wait_for_selector("text=No trial has a result yet.")
        for _ in range(3):
            control.advance()
            world.claim_all()
            world.end(world.held[0])
        control.advance()
        page.wait_for_selector("svg.chart circle")
        assert violations(page) == []
        assert overflows(page) == []
        world.run(study)
        page.wait_for_selector("text=What was found")
        report = world.studies.store.report("default", study.id)
        assert report.winner is not None
        assert f"nightpress pull {report.winner.job_id}" in page.inner_text("main")
        assert page.locator("tbody tr").count() >= 8 + len(report.front)
        assert page.locator("text=cosine >= 0.95").first.is_visible()
        assert violations(page) == []
        assert page.title() == f"{HOSTILE} · Nightpress"
        assert seen.complaints == []
    world.engine.dispose()


def test_a_worker_shows_how_much_of_its_gpus_memory_is_in_use(browser: Browser, face: Face):
    gpu = Worker(
        "wkr_gpu", "gpu-host", "gpu", "NVIDIA H100", 80 * GB, 16, "0.1.0", gpu_memory=85 * GB, gpu_memory_used=31 * GB
    )
    face.store.roster.heartbeat_worker(gpu)
    face.store.roster.heartbeat_worker(Worker("wkr_cpu", "cpu-host", "cpu", "cpu", 20 * GB, 2, "0.1.0"))
    with signed_in(browser, face, "/workers") as seen:
        page = seen.page
        memory = page.wait_for_selector("tr:has-text('gpu-host') progress")
        assert memory.get_attribute("aria-label") == "31.0 GB of 85.0 GB of GPU memory in use"
        assert page.inner_text("tr:has-text('cpu-host') td[data-of=Memory]") == "20.0 GB"
        assert violations(page) == []
    offer = host("wkr_host", 3, cpu_jobs=1)
    told = [{**asdict(gpu), "memory_used": used} for gpu, used in zip(offer.gpus, (GB, 2 * GB, None), strict=True)]
    face.store.roster.heartbeat_worker(replace(introduce(offer, draining=False), host="big-host", gpus=told))
    with signed_in(browser, face, "/workers") as seen:
        page = seen.page
        page.wait_for_selector("tr:has-text('big-host')")
        assert page.locator("tr:has-text('big-host') progress").count() == 2, "a bar for each GPU that says it"
        assert "80.0 GB on the GPU" in page.inner_text("tr:has-text('big-host') td[data-of=Memory]")
        assert "3 of 3 free" in page.inner_text("tr:has-text('big-host') td[data-of=Device]")
        assert page.inner_text("tr:has-text('big-host') td[data-of=Queue]") == "gpu + 1 cpu"
        assert violations(page) == []
    for worker in ("wkr_gpu", "wkr_cpu", "wkr_host"):
        face.store.roster.remove_worker(worker)


@pytest.mark.parametrize(("viewport", "dark"), [(DESKTOP, False), (NARROW, True)])
def test_the_apis_reference_shows_every_operation_and_asks_no_other_origin(
    browser: Browser, face: Face, viewport: dict[str, int], dark: bool
):
    with browser.open(f"{face.url}/docs", viewport=viewport, dark=dark) as seen:
        page = seen.page
        page.wait_for_selector("#create_job")
        document = page.evaluate("fetch('/openapi.json').then((answer) => answer.json())")
        names = [method["operationId"] for methods in document["paths"].values() for method in methods.values()]
        assert [name for name in names if page.locator(f"details#{name}").count() != 1] == []
        page.locator("#create_job > summary").click()
        assert "all-minilm-l6-v2" in page.locator("#create_job").inner_text()
        page.locator("#create_job a", has_text="JobCreate").click()
        page.wait_for_selector("#schema-JobCreate[open]")
        assert not violations(page)
        assert not overflows(page)
        assert all(url.startswith(face.url) for url in seen.requests)
        assert seen.complaints == []


def test_what_people_write_is_shown_and_never_run(browser: Browser, face: Face, finished: list[str]):
    with signed_in(browser, face) as seen:
        link = seen.page.wait_for_selector(f"a[href='#/jobs/{finished[0]}']")
        assert link.inner_text() == HOSTILE
        link.click()
        seen.page.wait_for_selector("text=Before and after")
        assert HOSTILE in seen.page.title()
        assert seen.page.query_selector("img[src=x]") is None


def test_a_job_is_followed_live_from_queued_to_its_artifacts(browser: Browser, face: Face, model_id: str):
    with face.client() as client:
        job = client.jobs.submit(model_id, RECIPE, name="followed", priority=50)
    with signed_in(browser, face, f"/jobs/{job.id}") as seen:
        page = seen.page
        page.wait_for_selector(".badge:has-text('queued')")
        claimed = face.claim()
        face.store.attempts.renew(
            claimed.lease, ttl_s=60, progress=Progress(phase="pressing", fraction=0.4, message="layer 3 of 7")
        )
        face.store.attempts.append_logs(claimed.lease, [("info", "reading <weights>")])
        page.wait_for_selector(".now:has-text('layer 3 of 7')")
        assert page.get_attribute(".now progress", "aria-label") == "pressing, 40%"
        page.wait_for_selector(".log:has-text('reading <weights>')")
        outbox = TrackerStore(face.engine)
        outbox.use({"mlflow": "http://mlflow.example"})
        face.store.attempts.record_event(claimed.lease, "checkpoint", {})
        [due] = outbox.take_due("mlflow", limit=1)
        assert outbox.begun(due, "run-7", "http://mlflow.example/#/run-7")
        made = face.succeed(claimed)
        page.wait_for_selector("h2:has-text('Before and after')")
        assert page.get_attribute("a:has-text('Show in MLflow')", "href") == "http://mlflow.example/#/run-7"
        outbox.use({})
        assert "25%" in page.inner_text("#main")
        page.click("summary:has-text('2 files')")
        with page.expect_download() as download:
            page.click("button[aria-label='Download sub dir/model.safetensors']")
        weights = made / "compressed-tensors" / "sub dir" / "model.safetensors"
        assert Path(download.value.path()).read_bytes() == weights.read_bytes()
        with page.expect_download() as report:
            page.click("text=Save the report (HTML)")
        assert "<title>report</title>" in Path(report.value.path()).read_text()


def test_a_failed_job_says_why_and_what_to_do(browser: Browser, face: Face, finished: list[str]):
    with signed_in(browser, face, f"/jobs/{finished[2]}") as seen:
        said = seen.page.wait_for_selector(".notice.bad").inner_text()
        assert "The text is <b>empty</b>." in said
        assert "Add lines." in said


def test_a_job_is_cancelled_with_the_keyboard_alone(browser: Browser, face: Face, model_id: str):
    with face.client() as client:
        job = client.jobs.submit(model_id, RECIPE, name="unwanted")
        with signed_in(browser, face) as seen:
            page = seen.page
            page.wait_for_selector("button[aria-label='Cancel unwanted']").focus()
            page.keyboard.press("Enter")
            page.wait_for_selector("dialog[open]")
            page.keyboard.press("Escape")
            page.wait_for_selector("dialog", state="detached")
            assert client.jobs.get(job.id).state == "queued"
            page.focus("button[aria-label='Cancel unwanted']")
            page.keyboard.press("Enter")
            page.wait_for_selector("dialog[open]")
            page.focus("dialog button[value=yes]")
            page.keyboard.press("Enter")
            page.wait_for_selector("tr:has-text('unwanted') .badge:has-text('cancelled')")
        assert client.jobs.get(job.id).state == "cancelled"


def test_a_recipe_is_checked_while_it_is_written_and_then_submitted(browser: Browser, face: Face, model_id: str):
    with signed_in(browser, face, f"/jobs/new?model={model_id}") as seen:
        page = seen.page
        page.wait_for_selector(".plan dt:has-text('Memory')")
        page.fill("textarea", "name: mine\npasses: [{pass: magnitude, sparsity: 2}]\nexports: [safetensors]\n")
        fault = page.wait_for_selector(".plan [role=alert]").inner_text()
        assert "sparsity" in fault
        assert page.is_disabled("text=Submit")
        page.fill("textarea", "name: mine\npasses: [{pass: magnitude, sparsity: 0.5}]\nexports: [safetensors]\n")
        page.wait_for_selector(".plan li:has-text('50% zeros')")
        page.click("summary:has-text('Name, priority')")
        page.fill("input[placeholder='team=search env=nightly']", "team=search")
        page.click("button:has-text('Submit')")
        page.wait_for_selector(".badge:has-text('queued')")
        job_id = re.search(r"#/jobs/(job_\w+)", page.url)
    assert job_id is not None
    with face.client() as client:
        assert client.jobs.get(job_id[1]).labels == {"team": "search"}
        client.jobs.cancel(job_id[1])


def test_filters_are_in_the_address_and_an_empty_list_says_so(browser: Browser, face: Face, finished: list[str]):
    with signed_in(browser, face) as seen:
        page = seen.page
        page.click("button.chip:has-text('failed')")
        expect(page.locator("tbody tr")).to_have_count(1)
        assert page.url.endswith("#/jobs?state=failed")
        page.fill("input[aria-label='Only jobs with this label']", "team=nobody")
        page.keyboard.press("Enter")
        page.wait_for_selector(".empty:has-text('No job matches')")


def test_a_schedule_is_made_edited_suspended_and_deleted(browser: Browser, face: Face, model_id: str):
    with signed_in(browser, face, "/schedules") as seen:
        page = seen.page
        page.click("text=New schedule")
        page.wait_for_selector("form h2:has-text('New schedule')")
        page.get_by_label("Name").fill("nightly-search")
        page.get_by_label("When (cron)").fill("every night")
        page.get_by_label("Time zone").fill("Australia/Lord_Howe")
        page.click("form button:has-text('Create')")
        page.wait_for_selector("form [role=alert]")
        page.get_by_label("When (cron)").fill("30 2 * * *")
        page.click("form button:has-text('Create')")
        page.wait_for_selector("h1:has-text('nightly-search')")
        page.click("button:has-text('Edit')")
        page.get_by_label("When (cron)").fill("0 3 * * *")
        page.click("form button:has-text('Save')")
        page.wait_for_selector("dd:has-text('0 3 * * *')")
        page.click("button:has-text('Suspend')")
        page.wait_for_selector("dd .badge:has-text('suspended')")
        assert violations(page) == []
        page.click("button:has-text('Delete')")
        page.click("dialog button[value=yes]")
        page.wait_for_selector(".empty:has-text('No schedules yet')")


def test_a_schedule_that_fetches_its_model_from_a_bucket_is_made_and_moved(browser: Browser, face: Face):
    with signed_in(browser, face, "/schedules") as seen:
        page = seen.page
        page.click("text=New schedule")
        page.get_by_label("Name").fill("from-bucket")
        page.get_by_label("Model", exact=True).fill("brought-by-night")
        page.get_by_label("Fetched from").fill("s3://elsewhere/minilm")
        page.click("form button:has-text('Create')")
        assert "s3://elsewhere" in page.wait_for_selector("form [role=alert]").inner_text()
        page.get_by_label("Fetched from").fill("s3://released/minilm")
        page.click("form button:has-text('Create')")
        page.wait_for_selector("dd code:has-text('s3://released/minilm')")
        page.click("button:has-text('Edit')")
        page.get_by_label("Fetched from").fill("s3://released/minilm-2")
        page.click("form button:has-text('Save')")
        page.wait_for_selector("dd code:has-text('s3://released/minilm-2')")
        assert violations(page) == []
        page.click("button:has-text('Delete')")
        page.click("dialog button[value=yes]")
        page.wait_for_selector(".empty:has-text('No schedules yet')")


def test_a_models_page_says_what_its_name_points_at_and_can_point_back(browser: Browser, face: Face, model_id: str):
    with face.client() as client:
        ids = [client.jobs.submit(model_id, RECIPE, name=f"promoted {at}").id for at in range(2)]
    for _ in ids:
        face.succeed(face.claim())
    with signed_in(browser, face, f"/models/{model_id}") as seen:
        page = seen.page
        page.wait_for_selector(f"tbody tr:first-child:has-text('{ids[1]}')")
        assert violations(page) == []
        page.click(f"button[aria-label='Point bert-tiny at {ids[0]} again']")
        page.wait_for_selector(f"tbody tr:first-child:has-text('{ids[0]}')")
        assert "manual" in page.inner_text("tbody tr:first-child")


def test_text_to_copy_has_its_button_only_where_the_browser_lends_its_clipboard(browser: Browser, face: Face):
    with signed_in(browser, face, "/schedules") as seen:
        seen.page.wait_for_selector(".empty pre:has-text('nightpress schedule add')")
        assert seen.page.locator(".empty button:text-is('Copy')").count() == 1
    with signed_in(browser, face) as seen:
        page = seen.page
        page.wait_for_selector("h1:has-text('Jobs')")
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as over plain HTTP
        page.evaluate("location.hash = '#/schedules'")
        page.wait_for_selector(".empty pre:has-text('nightpress schedule add')")
        assert page.locator(".empty button").count() == 0


def test_artifacts_that_others_beat_are_greyed(browser: Browser, face: Face, finished: list[str]):
    with signed_in(browser, face, f"/compare?job={finished[0]}&job={finished[1]}") as seen:
        page = seen.page
        page.wait_for_selector("caption:has-text('Artifacts and their sources')", state="attached")
        # The two reports are equal, so neither dominates the other. The source is the fastest.
        assert page.locator("tr.dominated").count() == 0
        assert page.locator("svg[role=img]").count() == 2
        points = page.evaluate(
            """async () => {
                const { points } = await import('/static/comparison.js');
                const subject = (size, quality, ms) => ({format: 'x', size_bytes: size, measurements: [{name: 'cosine', value: quality, better: 'higher'}], timings: [{p50_ms: ms}]});
                const report = (size, quality, ms) => ({job: 'j', report: {model: {name: 'm', digest: 'd'}, recipe: {name: 'r'}, source: subject(100, 1, 9), artifacts: [subject(size, quality, ms)]}});
                return points([report(50, 0.9, 5), report(60, 0.8, 6), report(40, 0.7, 8)]).map(one => [one.size, one.dominated]);
            }"""
        )
        assert sorted(points) == [[40, False], [50, False], [60, True], [100, False]]


def test_a_server_that_goes_away_is_said_and_found_again(browser: Browser, face: Face, finished: list[str]):
    with signed_in(browser, face) as seen:
        page = seen.page
        page.wait_for_selector(f"a[href='#/jobs/{finished[0]}']")
        face.stop()
        page.wait_for_selector('[role=alert]:has-text("doesn\'t answer")')
        assert page.query_selector(f"a[href='#/jobs/{finished[0]}']") is not None
        face.start()
        page.wait_for_selector("[role=alert]", state="detached")
