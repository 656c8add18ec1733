"""Trains the models of bench.shape_to_speed: the jobs side by side on one device, each in a process of its own, packed for the measuring."""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.shape_kinds import KINDS, Answer, Kind, Qualities, train_reranker, untrained_reranker
from bench.trained import ship, unship
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Batch
from nightpress.core.compress.model.companions import family_member
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.passes import MODEL_PASSES
from nightpress.core.compress.passes.latency_table import LatencyTable
from nightpress.core.compress.passes.shape import shape_to_speed_with
from nightpress.core.recipes.depth import evenly
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes import Distill, ShapeToSpeed
from tests.models import minilm_dir

_TRAIN = {
    "data": "train",
    "length": 128,
    "batch": 128,
    "validation": 0.05,
    "precision": "auto",
    "freeze_embeddings": False,
}
_PART = 15_500_000  #: bytes of a file of OUT
_STEP = 1.5


@dataclass(frozen=True)
class Times:
    """A table, and what the source takes in the runtime that runs it fastest."""

    table: LatencyTable
    ahead: float  #: how many times as fast as in the table's runtime the source is in the best one

    @classmethod
    def read(cls, file: Path) -> "Times":
        raw = json.loads(file.read_text())
        return cls(LatencyTable.from_json(json.dumps(raw["table"])), raw["ahead"])

    def write(self, file: Path) -> None:
        file.write_text(json.dumps({"ahead": self.ahead, "table": asdict(self.table)}, indent=1))

    def asked(self, speed: float) -> float:
        """The speed over the source in the table's runtime that is `speed` over the source in the best one, and 5% more."""
        return round(1.05 * speed * self.ahead, 2)


def options_of(given: Namespace, speeds: Sequence[float]) -> ShapeToSpeed:
    kind = KINDS[given.kind]
    return ShapeToSpeed.model_validate(
        {
            "pass": "shape-to-speed",
            "speeds": speeds,
            "step": _STEP,
            "runtime": given.runtime,
            "type": given.type,
            "train": _training(given, given.epochs or kind.epochs),
            **kind.losses,
        }
    )


def _training(given: Namespace, epochs: int) -> dict[str, Any]:
    return {**_TRAIN, "learning_rate": given.learning_rate, **KINDS[given.kind].train, "epochs": epochs}


def press(given: Namespace) -> int:
    """Run all jobs at the same time and pack their models into OUT, with what was told of them in OUT/told.json."""
    given.press.mkdir(parents=True, exist_ok=True)
    kind, start = KINDS[given.kind], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as scratch:
        work = Path(scratch)
        base, files = base_of(given, work), kind.files(given.data, work)
        source, made = base, dict[str, Path]()
        if given.kind == "reranker":
            source = made["source"] = work / "reranker"
            train_reranker(base, files, source, given.device, given.teacher_epochs)
            print(f"reranker: trained, {time.monotonic() - start:.0f} s", flush=True)
        told: dict[str, Any] = {"source": _told(kind, source, source, files, given.device)}
        print(json.dumps(told["source"]["quality"]), flush=True)
        names = [name for name in _jobs(kind) if name.partition("-")[0] in given.only]
        jobs = {name: _started(given, name, source, work / "jobs") for name in names}
        left = {name: _end_of(job, start + given.seconds) for name, job in jobs.items()}
        failed = [name for name, status in left.items() if status != 0]
        for name in names:
            record = work / "jobs" / name / "told.json"
            if record.is_file():
                found = json.loads(record.read_text())
                told |= found["told"]
                made |= {model: Path(folder) for model, folder in found["folders"].items()}
            elif name == "shape":  # it was stopped: what it had saved is kept
                made |= _saved(given, work / "jobs" / name)
        told["seconds"] = round(time.monotonic() - start, 1)
        whole = _pack(source, base, made, 1e6 * given.most, told)
    for at, begin in enumerate(range(0, len(whole), _PART)):
        (given.press / f"{given.kind}.tar.{at}").write_bytes(whole[begin : begin + _PART])
    for name, record in told.items():
        if isinstance(record, dict) and "quality" in record:
            print(f"{name:12} {json.dumps(record['quality'])} {json.dumps(record.get('change', {}))}", flush=True)
    print(f"{told['seconds']} s; failed: {failed}; left out: {told['left_out']}", flush=True)
    return int(bool(failed))


def base_of(given: Namespace, work: Path) -> Path:
    """The folder of the model that is brought; for a reranker, the embedder with an untrained head."""
    brought = minilm_dir(work) if str(given.model) == "minilm" else Path(given.model)
    return untrained_reranker(brought, work / "untrained") if given.kind == "reranker" else brought


def _jobs(kind: Kind) -> list[str]:
    return ["shape", *(f"layers-{speed:g}x" for speed in kind.speeds)]


def _end_of(job: "subprocess.Popen[bytes]", deadline: float) -> int:
    """Wait for a job until the deadline and stop it then. Returns its exit status."""
    try:
        return job.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        job.kill()
        return job.wait()


def _saved(given: Namespace, work: Path) -> dict[str, Path]:
    """The models that the job `shape` has finished."""
    speeds, times = KINDS[given.kind].speeds, Times.read(given.table)
    folders = {f"shape-{speed:g}x": family_member(work / "out", times.asked(speed)) for speed in speeds[:-1]}
    return {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}


def _started(given: Namespace, name: str, source: Path, work: Path) -> "subprocess.Popen[bytes]":
    values = {"--table": given.table, "--runtime": given.runtime, "--type": given.type, "--device": given.device}
    values |= {"--learning-rate": given.learning_rate, "--job": name, "--press": work / name}
    if given.epochs:
        values["--epochs"] = given.epochs
    words = [str(word) for pair in values.items() for word in pair]
    command = [sys.executable, "-m", "bench.shape_to_speed", given.kind, str(source), str(given.data), *words]
    return subprocess.Popen(command)


def run_job(given: Namespace) -> int:
    """One job: `shape`, or distillation to fewer layers for one speed. Leaves OUT/told.json and the models' folders below OUT."""
    given.press.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(max(1, torch.get_num_threads() // 4))
    kind, times, start = KINDS[given.kind], Times.read(given.table), time.monotonic()
    files = kind.files(given.data, given.press)
    made, told = (_shaped if given.job == "shape" else _fewer_layers)(given, times, files)
    for name, folder in made.items():
        told[name] |= _told(kind, folder, given.model, files, given.device)
    for record in told.values():
        record["seconds"] = round(time.monotonic() - start, 1)
    folders = {name: str(folder) for name, folder in made.items()}
    (given.press / "told.json").write_text(json.dumps({"told": told, "folders": folders}))
    return 0


def _told(kind: Kind, folder: Path, source: Path, files: Mapping[str, Path], device: str) -> dict[str, Any]:
    """A model's qualities in float, and their change from the source's with a 95% interval of paired differences."""
    found = kind.quality(source, files, _in_torch(folder, source, device), torch.device(device))
    told: dict[str, Any] = {"quality": {name: round(float(values.mean()), 4) for name, values in found.items()}}
    if folder != source:
        before = kind.quality(source, files, _in_torch(source, source, device), torch.device(device))
        told["change"] = {name: changes(found, before)[name] for name in found}
    return told


def changes(found: Qualities, before: Qualities) -> dict[str, list[float]]:
    """Quality → its mean change, and the ends of its 95% interval."""
    result = {}
    for name, values in found.items():
        change = values - before[name]
        half = 1.96 * float(change.std(ddof=1)) / len(change) ** 0.5
        mean = float(change.mean())
        result[name] = [round(mean, 4), round(mean - half, 4), round(mean + half, 4)]
    return result


def _in_torch(folder: Path, source: Path, device: str) -> Answer:
    config = json.loads((folder / "config.json").read_bytes())
    model = load_model(folder, inspect_model(FolderFiles(source)).model_copy(update={"config": config})).to(device)

    def answer(batch: Batch) -> NDArray[np.float32]:
        with torch.inference_mode():
            found: NDArray[np.float32] = model(**batch.inputs)[0].float().cpu().numpy()
        return found

    return answer


def _context(given: Namespace, files: Mapping[str, Path], work: Path) -> PassContext:
    work.mkdir(parents=True, exist_ok=True)
    return PassContext(
        header=inspect_model(FolderFiles(given.model)),
        work_dir=work,
        device=given.device,
        threads=torch.get_num_threads(),
        data_files=files,
        progress=_telling(given.job),
    )


def _telling(name: str) -> Callable[[float, str], None]:
    said = [0.0]

    def tell(share: float, text: str) -> None:
        if time.monotonic() - said[0] > 20:
            said[0] = time.monotonic()
            print(f"{name}: {share:4.0%} {text}", file=sys.stderr, flush=True)

    return tell


_Made = tuple[dict[str, Path], dict[str, Any]]


def _shaped(given: Namespace, times: Times, files: Mapping[str, Path]) -> _Made:
    speeds = KINDS[given.kind].speeds
    asked = {speed: times.asked(speed) for speed in speeds}
    options, out = options_of(given, list(asked.values())), given.press / "out"
    record = shape_to_speed_with(given.model, out, options, _context(given, files, given.press / "work"), times.table)
    stages = {stage["speed"]: stage for stage in record.summary["stages"]}
    folders = {
        f"shape-{speed:g}x": out if speed == speeds[-1] else family_member(out, asked[speed]) for speed in speeds
    }
    return folders, {f"shape-{speed:g}x": stages[asked[speed]] for speed in speeds}


def _fewer_layers(given: Namespace, times: Times, files: Mapping[str, Path]) -> _Made:
    """Distil to as many layers as the table allows at a speed, in as many steps as the shaped model of that speed has had."""
    speed = float(given.job.removeprefix("layers-").removesuffix("x"))
    kind, table = KINDS[given.kind], times.table
    options = options_of(given, [times.asked(other) for other in kind.speeds if other <= speed])
    layers = options.anatomy(inspect_model(FolderFiles(given.model))).layers
    layer = max(table.heads.values()) + max(table.widths.values())
    fitting = (n for n in range(layers, 0, -1) if table.source / (table.rest + n * layer) >= times.asked(speed))
    count = next(fitting, 1)
    epochs = len(options.stages) * (given.epochs or kind.epochs)
    told = {"layers": count, "epochs": epochs, "estimated_speed": round(table.source / (table.rest + count * layer), 3)}
    folder = given.model
    if count < layers:  # else int8 alone is fast enough
        folder = given.press / "out"
        student = {"layers": evenly(count, layers)}
        chosen = {"pass": "distill", "student": student, "train": _training(given, epochs), **kind.losses}
        context = _context(given, files, given.press / "work")
        MODEL_PASSES["distill"](given.model, folder, Distill.model_validate(chosen), context)
    return {given.job: folder}, {given.job: told}


# Packing ------------------------------------------------------------------------------------------------------------------


def _pack(source: Path, base: Path, made: Mapping[str, Path], most: float, told: dict[str, Any]) -> bytes:
    """Pack what differs from the source's files, the fastest models first, as long as there is room, and what was told. most: bytes."""
    order = sorted(made, key=lambda name: (name != "source", not name.startswith("shape"), -_speed(name)))
    packed, told["left_out"] = io.BytesIO(), []
    with tarfile.open(fileobj=packed, mode="w") as archive, tempfile.TemporaryDirectory() as scratch:
        for name in order:
            folder = Path(scratch) / name
            ship(base if name == "source" else source, made[name], folder, rows=True)
            if packed.tell() + sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > most:
                told["left_out"].append(name)
                continue
            archive.add(folder, name)
        (Path(scratch) / "told.json").write_text(json.dumps(told, indent=1))
        archive.add(Path(scratch) / "told.json", "told.json")
    return packed.getvalue()


def _speed(name: str) -> float:
    return float(name.partition("-")[2].removesuffix("x") or 0)


def unpacked(given: Namespace, base: Path, folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """The models of OUT, in folders below `folder`, and what was told of them. With a `source` among them, the others are based on it."""
    parts = sorted(given.measure.glob(f"{given.kind}.tar.*"))
    packed = folder / "packed"
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        archive.extractall(packed, filter="data")
    names = [path.name for path in packed.iterdir() if path.is_dir()]
    found: dict[str, Path] = {}
    for name in sorted(names, key=lambda name: (name != "source", name)):
        unship(found.get("source", base), packed / name, folder / name)
        found[name] = folder / name
    return found, json.loads((packed / "told.json").read_text())
