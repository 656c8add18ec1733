"""The Python client with a real API process, over good and bad connections."""

import asyncio
import hashlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightpress import ApiError, AsyncClient, Client, ClientError, TransferError, UnreachableError
from nightpress.client import calls
from nightpress.client.folders import read_model_folder
from nightpress.client.transfers import Transfers, target_of
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Progress
from nightpress.core.handoff.manifest import describe_folder
from nightpress.core.wire.jobs import JobView
from nightpress.core.wire.models import DataSetCreate, ModelCreate, upload_part_size
from tests.face import RECIPE, Face, pulled_files
from tests.patience import slowness
from tests.proxy import CuttingProxy
from tests.servers import S3


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(tmp_path_factory.mktemp("face"))
    face.start()
    yield face
    face.close()


@pytest.fixture
def nightpress(face: Face) -> Iterator[Client]:
    with face.client() as client:
        yield client


@pytest.fixture
def proxy(face: Face) -> Iterator[CuttingProxy]:
    with CuttingProxy(face.settings.api_port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def model_id(face: Face, bert_tiny: Path) -> str:
    with face.client() as client:
        return client.models.upload(bert_tiny).id


@pytest.fixture
def job(nightpress: Client, model_id: str) -> Iterator[JobView]:
    """A queued job that no other test will claim by mistake."""
    job = nightpress.jobs.submit(model_id, RECIPE)
    yield job
    nightpress.jobs.cancel(job.id)


@pytest.mark.slow
def test_a_folder_is_sent_whole_and_only_once(nightpress: Client, bert_tiny: Path, model_id: str):
    model = nightpress.models.get(model_id)
    assert (model.state, model.name, model.model_type) == ("ready", "bert-tiny", "bert")
    assert {(file.path, file.sha256) for file in model.files} == {
        (file.path, file.sha256) for file in describe_folder(bert_tiny)
    }
    assert nightpress.models.upload(bert_tiny).id == model_id


def test_a_broken_upload_is_continued_by_the_next(nightpress: Client, bert_tiny: Path):
    files = [file.model_dump() for file in describe_folder(bert_tiny)]
    begun = nightpress.send(calls.create_model(ModelCreate.model_validate({"name": "begun", "files": files})))
    assert begun.state == "uploading"
    finished = nightpress.models.upload(bert_tiny, "begun")
    assert (finished.id, finished.state) == (begun.id, "ready")


@pytest.mark.slow
def test_an_upload_survives_cut_connections(face: Face, proxy: CuttingProxy, bert_tiny: Path):
    with face.client(proxy.url) as client:
        folder = read_model_folder(bert_tiny, "through-cuts")
        client.models.list()
        proxy.cut_answers(0, 10, 0)
        assert client.models.upload(folder).state == "ready"


def test_what_is_no_model_is_refused_before_a_byte_is_sent(nightpress: Client, tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NightpressError, match="pickle") as caught:
        nightpress.models.upload(tmp_path)
    assert caught.value.code == ErrorCode.UNSUPPORTED_FORMAT
    assert "nightpress convert" in caught.value.hint


def test_a_data_set_is_sent_and_found(nightpress: Client, tmp_path: Path):
    (tmp_path / "reviews.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad", "label": 0}\n')
    data_set = nightpress.data_sets.upload(tmp_path / "reviews.jsonl")
    assert (data_set.state, data_set.name, data_set.rows, data_set.labelled) == ("ready", "reviews", 2, True)
    assert data_set.id in {item.id for item in nightpress.data_sets.iterate()}
    nightpress.data_sets.delete(data_set.id)


@pytest.mark.slow
def test_a_large_file_goes_in_parts_that_are_checked_each(nightpress: Client, tmp_path: Path):
    file = tmp_path / "large.txt"
    line = b"The press ran all night and nobody heard it.\n"
    file.write_bytes(line * (upload_part_size(1) // len(line) + 1))
    transfers = Transfers(nightpress.http, nightpress.options)
    [announced] = transfers.hash_files({"large.txt": file})
    whole = file.read_bytes()
    parts = [whole[: upload_part_size(1)], whole[upload_part_size(1) :]]
    assert announced.part_sha256 == [hashlib.sha256(part).hexdigest() for part in parts]
    begun = nightpress.send(calls.create_data_set(DataSetCreate(name="large", file=announced)))
    missing = nightpress.send(calls.uploads("datasets", begun.id))
    swapped = missing[0].parts[1].model_copy(update={"offset": 0})
    with pytest.raises(ApiError) as refused:
        transfers.upload([missing[0].model_copy(update={"parts": [swapped]})], {"large.txt": file}, lambda: missing)
    assert refused.value.code == "checksum_mismatch"
    assert nightpress.data_sets.upload(file).state == "ready"
    nightpress.data_sets.delete(begun.id)


def test_jobs_are_listed_page_by_page_without_gaps(nightpress: Client, model_id: str):
    labels = {"suite": "pages"}
    made = [nightpress.jobs.submit(model_id, RECIPE, labels=labels).id for _ in range(5)]
    first = nightpress.jobs.list(labels=labels, limit=2)
    second = nightpress.jobs.list(labels=labels, limit=2, cursor=first.next_cursor)
    assert [job.id for job in (*first.items, *second.items)] == made[:0:-1]
    assert [item.id for item in nightpress.jobs.iterate(labels=labels)] == made[::-1]
    for item in made:
        assert nightpress.jobs.cancel(item).state == "cancelled"
    assert not list(nightpress.jobs.iterate(labels=labels, states=["queued"]))


@pytest.mark.slow
def test_a_name_means_what_was_sent_last_though_it_was_sent_before(nightpress: Client, bert_tiny: Path, tmp_path: Path):
    folder = tmp_path / "back-and-forth"
    shutil.copytree(bert_tiny, folder)
    sent = []
    for content in ("first", "first", "second", "first", "first"):
        (folder / "README.md").write_text(content)
        sent.append(nightpress.models.upload(folder).id)
        assert nightpress.models.get("back-and-forth").id == sent[-1]
    assert sent[0] == sent[1], "what the name means already is not sent again"
    assert sent[3] == sent[4]
    assert len(set(sent)) == 3


def test_a_lost_answer_to_submit_makes_no_second_job(face: Face, proxy: CuttingProxy, model_id: str):
    with face.client(proxy.url) as client:
        proxy.cut_answers(0, 5)
        job = client.jobs.submit(model_id, RECIPE, labels={"suite": "lost"})
        assert [found.id for found in client.jobs.iterate(labels={"suite": "lost"})] == [job.id]
        client.jobs.cancel(job.id)


def test_a_lost_answer_to_retry_makes_no_second_retry(
    face: Face, proxy: CuttingProxy, nightpress: Client, model_id: str
):
    job = nightpress.jobs.submit(model_id, RECIPE, labels={"suite": "again"})
    nightpress.jobs.cancel(job.id)
    with face.client(proxy.url) as client:
        proxy.cut_answers(0)
        retry = client.jobs.retry(job.id)
    assert [item.id for item in nightpress.jobs.iterate() if item.retry_of == job.id] == [retry.id]
    nightpress.jobs.cancel(retry.id)


def test_a_problem_becomes_an_error_that_says_what_to_do(nightpress: Client, model_id: str):
    with pytest.raises(ApiError) as missing:
        nightpress.jobs.get("job_00000000000000000000000000")
    assert (missing.value.code, missing.value.status) == (ErrorCode.NOT_FOUND, 404)
    assert missing.value.hint
    assert missing.value.request_id
    with pytest.raises(ApiError) as wrong:
        nightpress.jobs.submit(model_id, {"name": "x", "passes": [{"pass": "gold"}], "exports": ["onnx"]})
    assert wrong.value.code == ErrorCode.INVALID_RECIPE
    with Client(nightpress.options.api_url, "np_wrong_key") as stranger, pytest.raises(ApiError) as refused:
        stranger.jobs.list()
    assert refused.value.code == ErrorCode.UNAUTHENTICATED


def test_nobody_there_is_said_so(tmp_path: Path):
    with (
        Client("http://127.0.0.1:1", "np_x", retries=0) as client,
        pytest.raises(UnreachableError, match="nothing answers"),
    ):
        client.jobs.list()


def test_recipes_plans_and_the_service_can_be_read(nightpress: Client, model_id: str):
    assert "int8-encoder" in {item.name for item in nightpress.recipes.list()}
    assert nightpress.recipes.get("int8-encoder").exports == ["onnx", "openvino"]
    plan = nightpress.recipes.validate(RECIPE, model_id)
    assert plan.estimate is not None
    assert plan.estimate.output_bytes["compressed-tensors"] > 0
    assert nightpress.ready().checks["database"] == "ok"
    assert nightpress.me().tenant_id == "default"
    assert {queue.name for queue in nightpress.queues()} == {"cpu", "gpu"}
    assert nightpress.workers() == []


def test_events_are_followed_over_cuts_without_gap_or_double(
    face: Face, proxy: CuttingProxy, nightpress: Client, job: JobView
):
    claimed = face.claim()
    seen: list[tuple[int, str]] = []

    def follow() -> None:
        with face.client(proxy.url) as client:
            seen.extend((event.seq, event.kind) for event in client.jobs.events(job.id))

    reader = threading.Thread(target=follow)
    reader.start()
    for step in range(6):
        face.store.attempts.record_event(claimed.lease, "checkpoint", {"step": step})
        if step in {2, 4}:
            proxy.drop_all()
    face.succeed(claimed)
    reader.join(30 * slowness())
    assert not reader.is_alive()
    assert [seq for seq, _ in seen] == list(range(1, len(seen) + 1))
    assert [kind for _, kind in seen].count("checkpoint") == 6
    assert seen[-1][1] == "succeeded"
    assert [event.seq for event in nightpress.jobs.events(job.id, after=3)] == [seq for seq, _ in seen if seq > 3]


def test_logs_are_read_and_followed(face: Face, nightpress: Client, job: JobView):
    claimed = face.claim()
    face.store.attempts.append_logs(claimed.lease, [("info", f"line {number}") for number in range(3)])
    assert [line.text for line in nightpress.jobs.logs(job.id)] == ["line 0", "line 1", "line 2"]
    face.succeed(claimed)
    assert [line.text for line in nightpress.jobs.logs(job.id, follow=True)][:3] == ["line 0", "line 1", "line 2"]


@pytest.mark.slow
def test_waiting_outlasts_a_restart_of_the_api(face: Face, job: JobView):
    claimed = face.claim()
    with face.client(retries=0) as client:
        views: list[JobView] = []
        ended: list[JobView] = []
        waiting = threading.Thread(
            target=lambda: ended.append(client.jobs.wait(job.id, poll_s=0.1, on_update=views.append))
        )
        waiting.start()
        face.stop()
        face.store.attempts.renew(claimed.lease, ttl_s=60, progress=Progress(phase="pressing", fraction=0.5))
        face.succeed(claimed)
        face.start()
        waiting.join(30 * slowness())
        assert [job.state for job in ended] == ["succeeded"]
        assert views[-1] == ended[0]


def test_waiting_ends_in_time_and_leaves_the_job_alone(nightpress: Client, job: JobView):
    with pytest.raises(TimeoutError):
        nightpress.jobs.wait(job.id, timeout_s=0.2)
    assert nightpress.jobs.get(job.id).state == "queued"


def test_artifacts_arrive_whole_over_a_bad_line(face: Face, proxy: CuttingProxy, job: JobView, tmp_path: Path):
    made = face.succeed(face.claim(), size=3_000_000)
    with face.client(proxy.url) as client:
        client.jobs.artifacts(job.id)
        proxy.cut_answers(1_000_000, 500_000)
        [folder] = client.jobs.download(job.id, tmp_path)
    assert pulled_files(folder) == describe_folder(made / "compressed-tensors")
    assert not list(tmp_path.rglob("*.part"))


def test_a_broken_download_goes_on_where_it_stopped(face: Face, proxy: CuttingProxy, job: JobView, tmp_path: Path):
    made = face.succeed(face.claim(), size=3_000_000)
    with face.client(proxy.url, retries=0) as client:
        whole = made / "compressed-tensors" / "sub dir" / "model.safetensors"
        half = tmp_path / "compressed-tensors" / "sub dir" / "model.safetensors.part"
        half.parent.mkdir(parents=True)
        half.write_bytes(whole.read_bytes()[:2_000_000])
        before = proxy.answered
        client.jobs.download(job.id, tmp_path)
        assert proxy.answered - before < 1_100_000
        assert (half.parent / "model.safetensors").read_bytes() == whole.read_bytes()
        before = proxy.answered
        client.jobs.download(job.id, tmp_path)
        assert proxy.answered - before < 10_000, "what is there and right is fetched again"


def test_a_stale_part_file_does_no_harm(face: Face, nightpress: Client, job: JobView, tmp_path: Path):
    made = face.succeed(face.claim())
    stale = tmp_path / "compressed-tensors" / "sub dir" / "model.safetensors.part"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another job" * 100)
    [folder] = nightpress.jobs.download(job.id, tmp_path)
    assert pulled_files(folder) == describe_folder(made / "compressed-tensors")


def test_damaged_bytes_never_get_their_name(face: Face, nightpress: Client, job: JobView, tmp_path: Path):
    made = face.succeed(face.claim())
    key = f"jobs/{job.id}/attempts/1/compressed-tensors/sub dir/model.safetensors"
    damaged = bytearray((made / "compressed-tensors" / "sub dir" / "model.safetensors").read_bytes())
    damaged[1000] ^= 1
    face.objects.put_bytes(key, bytes(damaged))
    with pytest.raises(TransferError, match="SHA-256"):
        nightpress.jobs.download(job.id, tmp_path)
    assert not list(tmp_path.rglob("model.safetensors*"))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "a\x1b[2Jb", ""])
def test_a_name_that_leaves_the_folder_is_not_written(name: str, tmp_path: Path):
    with pytest.raises(TransferError):
        target_of(tmp_path, name)


def test_an_artifact_that_is_not_there_is_named_with_those_that_are(
    face: Face, nightpress: Client, job: JobView, tmp_path: Path
):
    face.succeed(face.claim())
    with pytest.raises(ClientError, match=r"no onnx.*compressed-tensors"):
        nightpress.jobs.download(job.id, tmp_path, formats=["onnx"])


@pytest.mark.slow
def test_files_go_straight_to_and_from_an_s3_store(s3_server: S3, tmp_path: Path, bert_tiny: Path):
    own = Face(
        tmp_path / "face",
        storage_url=f"s3://{s3_server.create_bucket()}/np",
        s3_endpoint_url=s3_server.endpoint,
        s3_access_key_id=s3_server.access_key,
        s3_secret_access_key=s3_server.secret_key,
    )
    own.start()
    try:
        with own.client() as client, own.client() as other:
            model = client.models.upload(bert_tiny)
            assert model.state == "ready"
            job = client.jobs.submit(model.id, RECIPE)
            made = own.succeed(own.claim())
            # A store refuses a request with two kinds of credentials, so the client must not send its API key there.
            [folder] = other.jobs.download(job.id, tmp_path / "pulled")
            assert pulled_files(folder) == describe_folder(made / "compressed-tensors")
    finally:
        own.close()


@pytest.mark.slow
def test_the_asynchronous_client_does_the_same(face: Face, bert_tiny: Path, tmp_path: Path):
    async def whole_way() -> None:
        async with AsyncClient(face.url, face.key) as client:
            model = await client.models.upload(bert_tiny)
            job = await client.jobs.submit(model.id, RECIPE, labels={"suite": "async"})
            assert [found.id async for found in client.jobs.iterate(labels={"suite": "async"})] == [job.id]
            claimed = face.claim()
            face.store.attempts.append_logs(claimed.lease, [("info", "hello")])

            async def kinds() -> list[str]:
                return [event.kind async for event in client.jobs.events(job.id)]

            following = asyncio.create_task(kinds())
            await asyncio.sleep(0.2)
            await asyncio.to_thread(face.succeed, claimed)
            assert (await asyncio.wait_for(following, 20))[-1] == "succeeded"
            assert (await client.jobs.wait(job.id)).verdict == "accepted"
            assert "hello" in [line.text async for line in client.jobs.logs(job.id)]
            assert (await client.jobs.report(job.id)).report["verdict"] == "accepted"
            [folder] = await client.jobs.download(job.id, tmp_path)
            assert (folder / "config.json").read_text() == "{}"
            with pytest.raises(ApiError):
                await client.models.get("nobody")

    asyncio.run(whole_way())
