"""F1: a killed worker loses at most one step of work. Any worker can resume the job, and the result has the same bytes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nightpress.core.compress.passes import MODEL_PASSES, PassContext
from nightpress.core.database import transaction
from nightpress.core.handoff.manifest import describe_folder
from nightpress.core.ids import new_id
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from nightpress.core.service.compose import Resources
from nightpress.core.service.jobs.checkpoints import CheckpointIndex
from nightpress.core.service.tables.jobs import checkpoint_files, checkpoints
from nightpress.worker.control import Control
from tests.databases import migrated_sqlite
from tests.patience import slowness
from tests.service import Service, eventually

STEPS = {"name": "steps", "passes": [{"pass": "magnitude"}], "exports": ["safetensors"]}


@pytest.fixture
def service(tmp_path: Path, sqlite_url: str) -> Any:
    service = Service(tmp_path, sqlite_url, storage_url=str(tmp_path / "objects"), checkpoint_after_s=0.0)
    yield service
    service.close()


def break_off(service: Service, behaviour: str, job_id: str, *, step: int, pass_index: int = 0) -> None:
    """Start a worker with its own data folder, and kill it when it has stored the checkpoint of this step."""
    worker = service.start_worker(behaviour, NIGHTPRESS_DATA_DIR=str(service.settings.data_dir.parent / "elsewhere"))

    def stored_it() -> bool:
        noted = [event.data for event in service.events(job_id) if event.kind == "checkpoint"]
        return any(checkpoint["pass_index"] == pass_index and checkpoint["step"] >= step for checkpoint in noted)

    eventually(stored_it, within=120)
    worker.kill()
    worker.wait()


def finish(service: Service, behaviour: str | None, *, within: float = 60.0) -> None:
    slot, supervisor = service.slot(behaviour, memory=4 * 1024**3)
    eventually(lambda: service.store.expiry.expire_leases(backoff_s=0.0) or not service.running(), within=10)
    eventually(lambda: slot.serve() or not service.unfinished(), within=within)
    supervisor.close()


def stored(service: Service) -> list[Path]:
    return [path for path in Path(service.settings.objects_url, "checkpoints").rglob("*") if path.is_file()]


def sizes_stored(service: Service) -> list[int]:
    return sorted(path.stat().st_size for path in stored(service))


def steps_done(service: Service, job_id: str) -> list[str]:
    return [line for line in service.log(job_id).splitlines() if line.startswith("doing step")]


def test_another_worker_goes_on_behind_the_last_step_and_no_step_is_done_twice(service: Service) -> None:
    job_id = service.submit(STEPS)
    break_off(service, "stepping:3", job_id, step=3)
    finish(service, "stepping")
    assert steps_done(service, job_id) == [f"doing step {n}" for n in range(1, 6)]
    (resumed,) = [event.data for event in service.events(job_id) if event.kind == "resumed"]
    assert resumed == {"pass_index": 0, "step": 3, "files": 4, "from": [job_id]}
    service.check_invariants(job_id)


def test_f20_a_worker_that_drains_stores_what_it_has_and_its_peer_goes_on_from_there(service: Service) -> None:
    service.settings = service.settings.model_copy(update={"checkpoint_after_s": 3600.0})
    job_id = service.submit(STEPS)
    worker = service.start_worker("stepping:3", NIGHTPRESS_DATA_DIR=str(service.settings.data_dir.parent / "elsewhere"))
    service.await_log(job_id, "waiting")
    assert not stored(service), "too young to be worth a copy"
    worker.terminate()
    assert worker.wait(10 * slowness()) == 0
    finish(service, "stepping")
    assert steps_done(service, job_id) == [f"doing step {n}" for n in range(1, 6)]
    job, kinds = service.job(job_id), service.kinds(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 0)
    assert (kinds.count("started"), kinds.count("released"), kinds.count("succeeded")) == (2, 1, 1)
    service.check_invariants(job_id)


def test_another_job_with_the_same_beginning_goes_on_too_but_not_another_tenants(service: Service) -> None:
    first = service.submit(STEPS)
    break_off(service, "stepping:3", first, step=3)
    service.store.requests.request_cancel("default", first)
    second, stranger = service.submit(STEPS | {"name": "other"}), service.submit(STEPS, tenant_id="neighbour")
    finish(service, "stepping")
    assert len(steps_done(service, second)) == 2
    assert len(steps_done(service, stranger)) == 5


def test_a_damaged_checkpoint_is_told_and_done_again(service: Service) -> None:
    job_id = service.submit(STEPS)
    break_off(service, "stepping:3", job_id, step=3)
    damaged = next(path for path in stored(service) if path.read_bytes() == b"step 2\n")
    damaged.write_bytes(b"step 3\n")
    finish(service, "stepping")
    assert steps_done(service, job_id) == [f"doing step {n}" for n in (1, 2, 3, 2, 4, 5)]
    assert "step-2 can't be used, so its work is done again" in service.log(job_id)
    assert service.job(job_id).state == "succeeded"


def test_only_the_newest_file_of_a_name_is_kept_and_all_go_when_nobody_needs_them(service: Service) -> None:
    job_id = service.submit(STEPS)
    break_off(service, "stepping:5", job_id, step=5)
    assert sizes_stored(service) == [7] * 5 + [5000]
    settings = service.settings.model_copy(update={"checkpoint_keep_s": 0.0, "retry_backoff_s": 0.0})
    index = CheckpointIndex(service.engine)

    def sweep() -> None:
        control = Control(Resources(settings, service.engine), lambda _queue: None)
        control.tick()
        control.close()

    eventually(lambda: sweep() or not service.running(), within=10)
    sweep()
    assert sizes_stored(service) == [7] * 5 + [5000], "a job that isn't over may need them"
    service.store.requests.request_cancel("default", job_id)
    assert not index.due(3600.0)
    sweep()
    assert not sizes_stored(service)
    with transaction(service.engine, read_only=True) as connection:
        assert not connection.execute(checkpoints.select()).all()
        assert not connection.execute(checkpoint_files.select()).all()


def test_a_prefix_takes_no_more_than_its_share_of_storage(service: Service) -> None:
    service.settings = service.settings.model_copy(update={"checkpoint_bytes": 3500})
    job_id = service.submit(STEPS)
    finish(service, "stepping")
    assert service.job(job_id).state == "succeeded"
    assert 0 < sum(sizes_stored(service)) <= 3500 + 4000, "what is being replaced may lie there beside its successor"


def deep_bert(folder: Path, bert_tiny: Path) -> Path:
    """A BERT with six layers of random weights and BERT-tiny's tokenizer."""
    shutil.copytree(bert_tiny, folder)
    torch.manual_seed(0)
    config = transformers.BertConfig.from_pretrained(bert_tiny, num_hidden_layers=6)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


RECIPE = {
    "name": "deep",
    "passes": [{"pass": "sparsegpt"}, {"pass": "gptq", "group_size": 64}],
    "exports": ["compressed-tensors"],
    "calibration": {"samples": 8, "length": 32},
    "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
}


@pytest.mark.slow
def test_a_real_model_killed_between_two_blocks_ends_with_the_same_bytes(
    service: Service, tmp_path: Path, bert_tiny: Path
) -> None:
    """The kill comes in the second pass. The next attempt takes over the whole first pass, and the second pass up to its third block."""
    model = deep_bert(tmp_path / "deep", bert_tiny)
    service.model_id, service.model_digest = service.register(new_id("mdl"), model)
    recipe = parse_recipe(RECIPE)
    job_id = service.submit(recipe.model_dump(mode="json"))
    break_off(service, "pipeline_until:3", job_id, pass_index=1, step=3)
    finish(service, None)
    assert service.job(job_id).state == "succeeded", service.log(job_id)
    resumed = [event.data for event in service.events(job_id) if event.kind == "resumed"]
    assert {checkpoint["pass_index"] for checkpoint in resumed} == {0, 1}
    assert [checkpoint["step"] for checkpoint in resumed if checkpoint["pass_index"] == 1] == [3]
    assert "pass 1 (sparsegpt) was done before" in service.log(job_id)
    service.check_invariants(job_id)

    for index, options in enumerate(recipe.passes):
        target = tmp_path / "straight" / str(index)
        header = inspect_model(FolderFiles(model))
        context = PassContext(header, tmp_path / "work", index=index, calibration=recipe.calibration)
        MODEL_PASSES[options.pass_](model, target, options, context)
        model = target
    assert files_of(service, job_id) == {file.path: file.sha256 for file in describe_folder(model)}


GRAPH = {
    "name": "graph",
    "passes": [{"pass": "magnitude", "sparsity": 0.3}, {"pass": "static-int8"}],
    "exports": ["onnx"],
    "calibration": {"samples": 8, "length": 32},
    "evaluate": [{"metric": "fidelity", "samples": 4, "length": 16}],
}


@pytest.fixture(scope="module")
def graph_undisturbed(tmp_path_factory: pytest.TempPathFactory, bert_tiny: Path) -> dict[str, str]:
    """SHA-256 by path of the files of the graph's job when nothing breaks it off."""
    folder = tmp_path_factory.mktemp("undisturbed")
    service = Service(folder, migrated_sqlite(folder / "nightpress.db"), storage_url=str(folder / "objects"))
    try:
        service.model_id, service.model_digest = service.register(new_id("mdl"), bert_tiny)
        job_id = service.submit(parse_recipe(GRAPH).model_dump(mode="json"))
        finish(service, None, within=240)
        return files_of(service, job_id)
    finally:
        service.close()


def files_of(service: Service, job_id: str) -> dict[str, str]:
    """SHA-256 by path of the files of a job's only artifact."""
    (artifact,) = service.store.reader.artifacts(job_id)
    return {file["path"]: file["sha256"] for file in artifact.files}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "stored_at_least", "not_done_again"),
    [
        ("tracing", {"passes/0-magnitude.json"}, {"rewriting weights"}),
        (
            "calibration.npz",
            {"check.npy", "calibration.npz"},
            {"rewriting weights", "tracing the model into a graph", "rounding weights"},
        ),
    ],
    ids=["while it is traced", "while it is rounded"],
)
def test_a_killed_graph_goes_on_from_what_was_there_and_ends_with_the_same_bytes(
    service: Service,
    bert_tiny: Path,
    graph_undisturbed: dict[str, str],
    said: str,
    stored_at_least: set[str],
    not_done_again: set[str],
) -> None:
    recipe = parse_recipe(GRAPH).model_dump(mode="json")
    service.model_id, service.model_digest = service.register(new_id("mdl"), bert_tiny)
    job_id = service.submit(recipe)
    elsewhere = str(service.settings.data_dir.parent / "elsewhere")
    worker = service.start_worker(f"pipeline_until_said:{said}", NIGHTPRESS_DATA_DIR=elsewhere)

    def stored_it() -> bool:
        noted = [str(event.data["path"]) for event in service.events(job_id) if event.kind == "checkpoint"]
        return all(any(path.endswith(name) for path in noted) for name in stored_at_least)

    eventually(stored_it, within=240)
    worker.kill()
    worker.wait()
    finish(service, "telling", within=240)
    messages = [line for line in service.log(job_id).splitlines() if line.startswith("told: ")]
    assert service.job(job_id).state == "succeeded", service.log(job_id)
    assert not [message for message in messages if any(step in message for step in not_done_again)]
    assert [message for message in messages if "judging the graph" in message], "it was not rounded to its end before"
    assert files_of(service, job_id) == graph_undisturbed
    service.check_invariants(job_id)
