"""Adapters that a service registers beside the models that they were trained for, and merges when a job reads them."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nightpress import ApiError, AsyncClient
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.manifest import describe_folder, digest_of
from nightpress.core.service.registry.adapters import below_base
from nightpress.core.service.registry.contents import model_contents
from nightpress.core.wire.models import FileAnnouncement, ModelCreate, ModelView
from tests.adapters import train
from tests.command import run
from tests.every_family import save_family
from tests.face import RECIPE, Face
from tests.folders import load_tensors
from tests.hub import Hub
from tests.registry import TENANT, World, refusal, stored
from tests.service import Service, eventually

# transformers warns of names that peft still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
OWN = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in `llama`, and two adapters on it in `first` and `second`."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_family("llama", folder / "llama")
    for seed, name in enumerate(("first", "second")):
        train(base, folder / name / "adapter", seed=seed)
        shutil.move(folder / name / "adapter", folder / f"{name}-adapter")
    return folder


@pytest.fixture
def world(tmp_path: Path, sql_url: str, hub: Hub, folders: Path) -> Iterator[World]:
    more = {"hub_endpoint": hub.url, "hub_organisations": ["acme"], "model_roots": [folders]}
    world = World(tmp_path, sql_url, **more)
    yield world
    world.close()


def send(world: World, folder: Path, name: str, base: str | None = None) -> ModelView:
    """Upload a folder's files as a client does."""
    files = [FileAnnouncement(**entry.model_dump()) for entry in describe_folder(folder)]
    made = world.models.create(TENANT, ModelCreate(name=name, files=files, base=base))
    for upload in made.uploads:
        data = (folder / upload.path).read_bytes()
        for part in upload.parts:
            piece = data[part.offset : part.offset + part.size]
            world.models.receive_part(TENANT, made.id, upload.path, part.number, [piece], part.size)
    return world.models.complete(TENANT, made.id)


def noting(folders: Path, target: Path, base: str, **more: object) -> Path:
    """A copy of the first adapter, whose config names another base."""
    shutil.copytree(folders / "first-adapter", target)
    path = target / OWN[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base, **more}))
    return target


@pytest.mark.slow
def test_many_adapters_share_the_files_of_their_base(world: World, folders: Path) -> None:
    base = send(world, folders / "llama", "llama")
    before = set(stored(world.objects))
    adapters = [send(world, folders / f"{name}-adapter", name, base=reference) for name, reference in (("first", "llama"), ("second", base.id))]  # fmt: skip
    assert [(view.state, view.base_id, view.architecture) for view in adapters] == [("ready", base.id, base.architecture)] * 2  # fmt: skip
    assert {key.rpartition("/")[2] for key in set(stored(world.objects)) - before} == set(OWN)
    for view, name in zip(adapters, ("first", "second"), strict=True):
        own = [file for file in describe_folder(folders / f"{name}-adapter") if file.path in OWN]
        assert view.digest == digest_of([*describe_folder(folders / "llama"), *below_base(own)])
        assert view.size == sum(file.size for file in own)
        assert "README.md" in view.left_out
        base_part, own_part = model_contents(world.engine, view.id)
        assert (base_part.prefix, own_part.prefix) == (f"models/{base.id}", f"models/{view.id}")
    assert adapters[0].digest != adapters[1].digest
    assert world.models.possible(TENANT, "first") == world.models.possible(TENANT, "llama")


def test_an_adapter_on_the_servers_disk_and_a_base_in_storage(world: World, folders: Path) -> None:
    base = send(world, folders / "llama", "llama")
    path = str(folders / "first-adapter")
    view = world.models.create(TENANT, ModelCreate(name="first", path=path, base="llama"))
    assert (view.state, view.base_id, view.source) == ("ready", base.id, "path")


@pytest.mark.slow
def test_the_base_that_peft_noted_is_found(world: World, hub: Hub, folders: Path, tmp_path: Path) -> None:
    """By its repository, by the name under which it was brought, and by an address that nobody has fetched yet."""
    by_folder = send(world, folders / "llama", "llama")
    for number, noted in enumerate(("llama", "/home/somebody/Llama/")):
        view = send(world, noting(folders, tmp_path / str(number), noted), f"noting-{number}")
        assert (view.state, view.base_id) == ("ready", by_folder.id), view.error
    files = {path.name: path.read_bytes() for path in (folders / "llama").iterdir()}
    commit = hub.push("models/acme/other", files)
    adapter = noting(folders, tmp_path / "hub", "acme/other")
    hub.push("models/acme/tuned", {path.name: path.read_bytes() for path in adapter.iterdir()})
    view = world.models.create(TENANT, ModelCreate(name="tuned", source="hf://acme/tuned"))
    intake = world.patient_intake(pause_s=0.1)
    ready = eventually(lambda: intake.advance() or settled(world, view.id))
    assert ready.state == "ready", ready.error
    fetched = world.models.get(TENANT, str(ready.base_id))
    assert (fetched.name, fetched.source_url, fetched.revision) == ("other", "hf://acme/other@main", commit)
    again = send(world, adapter, "tuned-again")
    assert again.base_id == fetched.id  # not the other repository's base again


def settled(world: World, model_id: str) -> ModelView | None:
    view = world.models.get(TENANT, model_id)
    return view if view.state in {"ready", "failed"} else None


@pytest.mark.slow
def test_an_adapter_waits_for_a_base_that_is_fetched(world: World, hub: Hub, folders: Path) -> None:
    hub.push("models/acme/other", {path.name: path.read_bytes() for path in (folders / "llama").iterdir()})
    waiting = send(world, folders / "first-adapter", "first", base="hf://acme/other@main")
    assert waiting.state == "verifying"
    base = world.models.get(TENANT, "other")
    assert (base.state, base.id) == ("fetching", waiting.base_id)
    with pytest.raises(NightpressError, match="The adapter first needs the model other"):
        world.models.delete(TENANT, base.id)
    intake = world.patient_intake(pause_s=0.1)
    ready = eventually(lambda: intake.advance() or settled(world, waiting.id))
    assert (ready.state, ready.architecture) == ("ready", "LlamaForCausalLM"), ready.error


def test_an_adapter_fails_with_the_base_that_it_waits_for(world: World, hub: Hub, folders: Path) -> None:
    hub.push("models/acme/broken", {"config.json": b"{}", "model.safetensors": b"no tensors"})
    waiting = send(world, folders / "first-adapter", "first", base="hf://acme/broken")
    intake = world.patient_intake(pause_s=0.1)
    failed = eventually(lambda: intake.advance() or settled(world, waiting.id))
    code, text = refusal(failed)
    assert code == "conflict"
    assert "base broken failed" in text


def test_a_base_stays_while_an_adapter_needs_it(world: World, folders: Path) -> None:
    base = send(world, folders / "llama", "llama")
    adapter = send(world, folders / "first-adapter", "first", base="llama")
    with pytest.raises(NightpressError, match="The adapter first needs the model llama") as error:
        world.models.delete(TENANT, base.id)
    assert error.value.code is ErrorCode.CONFLICT
    world.models.delete(TENANT, adapter.id)
    world.models.delete(TENANT, base.id)
    assert stored(world.objects) == []


@pytest.mark.slow
def test_what_is_no_base_or_no_adapter_is_told(world: World, folders: Path, tmp_path: Path) -> None:
    def refused(folder: Path, base: str | None) -> NightpressError:
        with pytest.raises(NightpressError) as error:
            send(world, folder, "refused", base=base)
        assert error.value.hint
        return error.value

    adapter = folders / "first-adapter"
    assert refused(adapter, "nobody").code is ErrorCode.NOT_FOUND
    assert refused(adapter, "hf://elsewhere/model").code is ErrorCode.PATH_NOT_ALLOWED
    missing = refused(noting(folders, tmp_path / "a", "elsewhere/model"), None)
    assert missing.code is ErrorCode.UNSUPPORTED_FORMAT
    assert "'elsewhere/model', which its adapter_config.json names, is not registered here" in missing.message
    assert "--base" in missing.hint
    send(world, folders / "llama", "llama")
    assert refused(folders / "llama", "llama").code is ErrorCode.INVALID_REQUEST
    first = send(world, adapter, "first", base="llama")
    stacked = refused(folders / "second-adapter", first.id)
    assert stacked.code is ErrorCode.UNSUPPORTED_FORMAT
    assert "is an adapter itself" in stacked.message
    send(world, save_family("llama", tmp_path / "wide", intermediate_size=80), "wide")
    unfit = refused(adapter, "wide")
    assert unfit.code is ErrorCode.MALFORMED_MODEL
    assert "does not fit this base" in unfit.message
    prefix = refused(noting(folders, tmp_path / "p", "llama", peft_type="PREFIX_TUNING"), "llama")
    assert prefix.code is ErrorCode.UNSUPPORTED_FORMAT
    with pytest.raises(NightpressError, match="There is no model"):  # another tenant's models are none
        world.models.create("other", ModelCreate(name="x", path=str(adapter), base="llama"))


@pytest.mark.slow
def test_a_job_merges_the_adapter_into_its_base(tmp_path: Path, sqlite_url: str, folders: Path) -> None:
    """The worker gets the base's files and the adapter's, and its cache holds the base once for both adapters."""
    world = World(tmp_path, sqlite_url)
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20)
    send(world, folders / "llama", "llama")
    recipe = {"name": "merged", "passes": [], "exports": ["safetensors"], "evaluate": [{"metric": "fidelity", "samples": 2, "length": 16}]}  # fmt: skip
    for name in ("first", "second"):
        slot, _ = service.slot(None, memory=4 * 1024**3)  # of another worker on the same machine
        view = send(world, folders / f"{name}-adapter", name, base="llama")
        service.model_id, service.model_digest = view.id, str(view.digest)
        job_id = service.submit(recipe, stall_s=600.0)
        slot.serve()
        job = service.job(job_id)
        assert job.state == "succeeded", f"{job.error}\n{service.log(job_id)}"
        report = service.store.reader.report(job_id)
        assert report is not None
        assert report["model"]["adapter"] == "lora of rank 4 on 4 weights"
        target = tmp_path / "written.safetensors"
        service.objects.get_file(f"jobs/{job_id}/attempts/1/safetensors/model.safetensors", target)
        written = load_file(target)
        for tensor_name, tensor in load_tensors(folders / name / "merged").items():
            torch.testing.assert_close(written[tensor_name], tensor, rtol=1e-5, atol=1e-6)
    weights = next(file for file in describe_folder(folders / "llama") if file.path == "model.safetensors")
    blobs = [blob.name for blob in (service.settings.data_dir / "cache" / "blobs").iterdir()]
    assert blobs.count(weights.sha256) == 1
    service.close()
    world.close()


# Through the API, with both clients and the command line -----------------------------------------------------------------


@pytest.fixture(scope="module")
def face(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Face]:
    face = Face(tmp_path_factory.mktemp("face"))
    face.start()
    yield face
    face.close()


@pytest.mark.slow
def test_both_clients_bring_adapters(face: Face, folders: Path) -> None:
    async def alike() -> ModelView:
        async with AsyncClient(face.url, face.key) as client:
            return await client.models.upload(folders / "second-adapter", "second", base="llama")

    with face.client() as client:
        base = client.models.upload(folders / "llama")
        first = client.models.upload(folders / "first-adapter", "first", base=base.id)
        assert (first.state, first.base_id) == ("ready", base.id)
        assert client.models.upload(folders / "first-adapter", "first", base="llama").id == first.id
        assert {file.path for file in first.files} == set(OWN)
        second = asyncio.run(alike())
        assert (second.state, second.base_id) == ("ready", base.id)
        job = client.jobs.submit("first", RECIPE)
        assert (job.model_id, job.state) == (first.id, "queued")
        client.jobs.cancel(job.id)
        with pytest.raises(ApiError, match="There is no model 'nobody'") as error:
            client.models.upload(folders / "first-adapter", "x", base="nobody")
        assert error.value.code == ErrorCode.NOT_FOUND


@pytest.mark.slow
def test_an_adapter_is_submitted_from_the_command_line(face: Face, folders: Path, tmp_path: Path) -> None:
    """The base is a local folder here, which is sent first, and then a name."""
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    adapter, recipe = str(folders / "first-adapter"), ("-r", str(tmp_path / "recipe.json"), "--json")
    done = run(face, "submit", adapter, "--base", str(folders / "llama"), "--model-name", "by-folder", *recipe)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    with face.client() as client:
        model = client.models.get(job["model_id"])
        assert client.models.get(str(model.base_id)).name == "llama"
    shown = run(face, "models", "show", model.id)
    assert str(model.base_id) in shown.stdout
    added = run(face, "models", "add", adapter, "--base", "llama", "--name", "by-name", "--json")
    assert json.loads(added.stdout)["base_id"] == model.base_id
    wide = save_family("llama", tmp_path / "wide", intermediate_size=80)
    unfit = run(face, "submit", adapter, "--base", str(wide), *recipe)
    assert unfit.returncode != 0
    assert "does not fit this base" in unfit.stderr
    with face.client() as client:
        assert "wide" not in {found.name for found in client.models.iterate()}  # found out before anything was sent
        client.jobs.cancel(job["id"])
