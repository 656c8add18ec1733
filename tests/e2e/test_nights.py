"""A schedule over several nights: a real API, the steps of a real control process, a real worker, and weights that may change each night.

Each artifact's bytes are compared with the weights of its night. Where jobs are pressed every night, the pipeline presses them. Where the
schedule decides whether a job is needed, a child that copies the model is enough. To let time pass, the tests move the schedule's next fire in the
database.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import update

import nightpress.core.service.jobs.attempts
import nightpress.core.service.jobs.requests
import nightpress.core.service.jobs.service
from nightpress.client import Client
from nightpress.core.database import db_now, transaction
from nightpress.core.service.compose import Resources
from nightpress.core.service.tables.schedules import schedules
from nightpress.core.wire.schedules import ScheduleRunView
from nightpress.worker.control import Control
from tests.api import serve
from tests.service import Service, eventually

WITHIN_S = 240.0
Weights = dict[str, torch.Tensor]


def recipe(sparsity: float = 0.5, data: str | None = None) -> dict[str, Any]:
    quality = {"metric": "masked-lm", "data": data} if data else {"metric": "fidelity"}
    return {
        "name": "sparse",
        "passes": [{"pass": "magnitude", "sparsity": sparsity}],
        "exports": ["safetensors"],
        "evaluate": [{**quality, "samples": 4, "length": 16}],
    }


class Nights:
    """An installation with a schedule, whose fires the test triggers one by one."""

    def __init__(self, service: Service, client: Client, source: Path, folder: Path, behaviour: str | None) -> None:
        self.service = service
        self.client = client
        self._source = source
        self._folder = folder
        self._control = Control(Resources(service.settings, service.engine), lambda _: None)
        self._slot, _ = service.slot(behaviour, memory=4 * 1024**3)

    def train(self, seed: int) -> Weights:
        """Upload new weights under the model's name, as a training job does. Returns the weights."""
        folder = self._folder / f"tiny-{seed}"
        if not folder.exists():
            shutil.copytree(self._source, folder)
            torch.manual_seed(seed)
            weights = load_file(folder / "model.safetensors")
            moved = {
                name: tensor + 0.01 * torch.randn_like(tensor) if tensor.is_floating_point() else tensor
                for name, tensor in weights.items()
            }
            save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
        self.client.models.upload(folder, name="tiny")
        return load_file(folder / "model.safetensors")

    def write_data(self, line: str) -> None:
        file = self._folder / "lines.txt"
        file.write_text("".join(f"{line} number {index}, and so it goes on.\n" for index in range(8)))
        self.client.data_sets.upload(file, name="lines")

    def schedule(self, **more: Any) -> None:
        given = {"recipe": recipe(), **more}
        self.client.schedules.create("nightly", "0 2 * * *", "tiny", **given)

    def night(self) -> ScheduleRunView:
        """Let the schedule fire, and run the job that it submits. Returns the schedule's run."""
        before = len(self.runs())
        with transaction(self.service.engine) as connection:
            connection.execute(update(schedules).values(next_at=db_now(-1)))

        def decided() -> bool:
            self._control.tick()
            return len(self.runs()) > before and self.runs()[0].state != "pending"

        def over() -> bool:
            self._slot.serve()
            return self.runs()[0].job_state not in {"queued", "running"}

        # First the decision whether to reuse an earlier result: a faster worker would press the model again.
        eventually(decided, within=WITHIN_S)
        eventually(over, within=WITHIN_S)
        run = self.runs()[0]
        assert run.state != "failed", run.error
        if run.job_id is not None:
            job = self.client.jobs.get(run.job_id)
            assert job.state == "succeeded", f"{job.error}\n{self.service.log(job.id)}"
        return run

    def runs(self) -> list[ScheduleRunView]:
        return list(self.client.schedules.runs("nightly"))

    def latest(self) -> tuple[str, Weights]:
        """The job to which the model's name points, and its artifact's weights, downloaded as a deployment does."""
        job_id = self.client.models.latest("tiny").promotion.job_id
        folder = self._folder / f"fetched-{job_id}"
        if not folder.exists():
            self.client.jobs.download(job_id, folder)
        return job_id, load_file(next(folder.rglob("model.safetensors")))

    def close(self) -> None:
        self._control.close()


@pytest.fixture
def child() -> str | None:
    """What the worker's child does: a function of tests/children.py, or None for the real pipeline."""
    return "press"


@pytest.fixture
def nights(tmp_path: Path, sqlite_url: str, bert_tiny: Path, child: str | None) -> Iterator[Nights]:
    service = Service(tmp_path, sqlite_url, lease_ttl_s=20.0, run_limit_s=200.0)
    with serve(service.settings) as api, Client(api.url, api.key()) as client:
        nights = Nights(service, client, bert_tiny, tmp_path, child)
        yield nights
        nights.close()
    service.close()


def is_made_from(artifact: Weights, source: Weights) -> bool:
    """Whether every weight of the artifact is either zero or equal, bit by bit, to the source's."""
    names = [name for name in artifact if name in source and source[name].ndim == 2]
    assert names
    assert all((artifact[name] != 0).any() for name in names)
    return all(torch.equal(artifact[name], source[name].where(artifact[name] != 0, 0)) for name in names)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("only_if_changed", "child"), [(False, None), (True, "press")])
@pytest.mark.slow
def test_the_second_night_presses_the_second_weights(nights: Nights, only_if_changed: bool) -> None:
    first_weights = nights.train(1)
    nights.schedule(only_if_changed=only_if_changed)
    first = nights.night()
    job_id, artifact = nights.latest()
    assert job_id == first.job_id
    assert is_made_from(artifact, first_weights)

    second_weights = nights.train(2)
    second = nights.night()
    job_id, artifact = nights.latest()
    assert (second.state, second.job_id) == ("submitted", job_id)
    assert nights.client.jobs.get(job_id).reused_from is None
    assert is_made_from(artifact, second_weights)
    assert not is_made_from(artifact, first_weights)

    third = nights.night()
    if only_if_changed:
        assert (third.state, third.reason) == ("skipped", "unchanged")
        assert nights.latest()[0] == second.job_id
    else:
        assert third.job_id is not None
        assert nights.client.jobs.get(third.job_id).reused_from == second.job_id
    job_id, artifact = nights.latest()
    assert is_made_from(artifact, second_weights)

    nights.train(1)  # the second training was bad: return to the first weights
    nights.night()
    job_id, artifact = nights.latest()
    assert job_id not in {second.job_id, third.job_id}
    assert is_made_from(artifact, first_weights), "the name means what was brought last"


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_whatever_else_decides_the_result_is_a_change_too(nights: Nights, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same weights, a changed data set, recipe (of the same name) or engine leads to one new pressing."""
    nights.train(1)
    nights.write_data("The first text")
    nights.schedule(only_if_changed=True, recipe=recipe(data="lines"))
    pressed = [nights.night().job_id]
    for change in ("nothing", "data set", "nothing", "recipe", "engine", "nothing"):
        if change == "data set":
            nights.write_data("Quite another text")
        elif change == "recipe":
            job = nights.client.schedules.get("nightly").job.model_copy(update={"recipe": recipe(0.625, "lines")})
            nights.client.schedules.edit("nightly", job=job)
        elif change == "engine":
            for module in (
                nightpress.core.service.jobs.service,
                nightpress.core.service.jobs.attempts,
                nightpress.core.service.jobs.requests,
            ):
                monkeypatch.setattr(module, "ENGINE", "a later one/1")
        run = nights.night()
        if change != "nothing":
            assert run.job_id is not None, (change, run.reason)
            assert nights.client.jobs.get(run.job_id).reused_from is None, change
            pressed.append(run.job_id)
        else:
            assert run.reason == "unchanged"
    assert len(set(pressed)) == 4
