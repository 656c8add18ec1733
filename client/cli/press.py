"""`nightpress press`: run a recipe in this process, without a service."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal, get_args

import psutil
import typer

from nightpress.client.cli import output
from nightpress.client.cli.comparison import print_report
from nightpress.client.cli.exits import Exit
from nightpress.client.cli.recipes import read_recipe
from nightpress.client.cli.registration import left_out_text
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError
from nightpress.client.folders import ModelFolder, read_adapter_folder, read_model_folder
from nightpress.core.handoff.frames import Checkpoint, Log, Metric, Progress, Result, Span
from nightpress.core.handoff.manifest import FileEntry, Manifest, describe_file, digest_of
from nightpress.core.handoff.report import REPORT_FILE, Report
from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR, WORK_DIR, JobSpec
from nightpress.core.ids import new_id
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.models import Recipe, aim, parse_recipe
from nightpress.core.recipes.passes import catalog
from nightpress.core.recipes.placement import Seat
from nightpress.core.recipes.plan import make_plan
from nightpress.core.recipes.targets import Target
from nightpress.core.settings import load_settings

AnyFrame = Progress | Metric | Log | Checkpoint | Span | Result
_NEEDED = ("torch", "transformers", "safetensors")


def add_to(app: typer.Typer) -> None:
    app.command("press", rich_help_panel="This machine")(takes_session(press))


def press(
    session: Session,
    model: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A local model folder.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the result: a new or an empty one.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A built-in recipe's name, or a YAML file.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", "-t", help=f"What to press for, in place of a recipe: {', '.join(get_args(Target))}."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="A data set that the recipe names; may be repeated.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="FOLDER is an adapter (LoRA): the folder of the model that it was trained for.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all that this process may use.")] = 0,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: as the recipe says, else what is faster on this machine.")
    ] = "auto",
) -> None:
    """Press a local model on this machine, without a service. Ctrl-C stops it and leaves no partial result."""
    if device not in {"cpu", "cuda", "auto"}:
        raise typer.BadParameter(f"{device!r} is not cpu, cuda or auto.", param_hint="--device")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} exists and is not empty.", param_hint="--out")
    chosen = read_folder(model, base)
    header = chosen.header
    if chosen.left_out and not session.json:
        output.note(left_out_text(chosen.left_out), "dim")
    allow_passes()
    wanted = aim(_wanted(recipe, target), header)
    sets = read_data(wanted, data or [])
    threads = threads or len(os.sched_getaffinity(0))
    require_core()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torch reads it when it is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if (vllm_python := load_settings().vllm_python) is not None:  # the setting may come from a .env file
        os.environ["NIGHTPRESS_VLLM_PYTHON"] = str(vllm_python.absolute())

    if device == "auto":
        device = _device(wanted, header, threads, quiet=session.json)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the parent of the target, so that the finished result is moved by an atomic rename.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as folder:
        job_dir = Path(folder)
        write_job(job_dir, chosen, wanted, sets, device=device, threads=threads)
        try:
            manifest = run_here(job_dir, quiet=session.json)
        except KeyboardInterrupt:
            output.note("\nStopped; nothing was written.")
            raise typer.Exit(Exit.DETACHED) from None
        if out.exists():
            out.rmdir()
        (job_dir / OUT_DIR).replace(out)
    report = Report.model_validate_json((out / REPORT_FILE).read_bytes())
    if session.json:
        output.print_json({"out": str(out), "manifest": manifest, "report": report})
    else:
        print_report(report.model_dump(mode="json"))
        output.say(f"The result is in {out}.")
    raise typer.Exit(Exit.REJECTED if manifest.verdict == "rejected" else Exit.OK)


def allow_passes() -> None:
    """Let recipes name the passes of the packages that NIGHTPRESS_PASSES allows."""
    for fault in catalog.allow(load_settings().passes):
        output.note(fault, "yellow")


def _wanted(recipe: str | None, target: str | None) -> Recipe:
    if (recipe is None) == (target is None):
        raise typer.BadParameter("Give either --recipe or --target.", param_hint="--recipe")
    if target is not None:
        if target not in get_args(Target):
            raise typer.BadParameter(
                f"{target!r} is not a target. Targets: {', '.join(get_args(Target))}.", param_hint="--target"
            )
        return get_recipe(target)
    chosen = read_recipe(str(recipe))
    return get_recipe(chosen) if isinstance(chosen, str) else parse_recipe(chosen)


def _device(recipe: Recipe, header: ModelHeader, threads: int, *, quiet: bool) -> Literal["cpu", "cuda"]:
    """The device on which this machine presses best; prints why. Raises ClientError where the recipe needs a GPU and there is none."""
    from nightpress.core.compress.environment import gpu_memory

    memory, on_gpu = int(psutil.virtual_memory().total), gpu_memory()
    if (recipe.device == "gpu" or recipe.wants_several_gpus) and on_gpu is None:
        asked = f"gpus: {recipe.gpus}" if recipe.wants_several_gpus else "device: gpu"
        raise ClientError(
            f"The recipe says `{asked}`, and torch finds no GPU here.",
            hint="Set `device: auto` and leave out `gpus`, or pass --device cpu.",
        )
    vllm = load_settings().vllm_python is not None
    fleet = [Seat("cpu", memory, threads, vllm=vllm)]
    fleet += [] if on_gpu is None else [Seat("gpu", memory, threads, on_gpu, vllm=vllm)]
    plan = make_plan(recipe, header, fleet)
    if on_gpu is not None and not quiet:
        output.note(f"On the {'GPU' if plan.queue == 'gpu' else 'processor'}: {plan.queue_reason}", "dim")
    return "cuda" if plan.queue == "gpu" else "cpu"


def require_core() -> None:
    """Check that the libraries of the compression core are installed. Raises ClientError where they are missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ClientError(
            f"Pressing on this machine needs {', '.join(missing)}.",
            hint="Install the extra: `pip install 'nightpress[compress]' -r requirements-cpu.txt`. Or send the job to a service: `nightpress submit`.",
        )


def read_data(recipe: Recipe, given: list[str]) -> dict[str, Path]:
    """The local file of each data set that the recipe names. Raises BadParameter for a file that is missing or not given."""
    sets: dict[str, Path] = {}
    for assignment in given:
        name, _, file = assignment.partition("=")
        if not file or not Path(file).is_file():
            raise typer.BadParameter(f"{assignment!r} is not NAME=FILE with a file that exists.", param_hint="--data")
        sets[name] = Path(file)
    if missing := sorted(recipe.data_refs() - sets.keys()):
        raise typer.BadParameter(
            f"The recipe uses {', '.join(missing)}. Name the file with --data {missing[0]}=FILE.",
            param_hint="--data",
        )
    return {name: path for name, path in sets.items() if name in recipe.data_refs()}


def read_folder(model: Path, base: Path | None) -> ModelFolder:
    """The model in a folder; with `base`, the model that the adapter in it makes of its base."""
    if base is None:
        return read_model_folder(model)
    return read_adapter_folder(model, read_model_folder(base))


def write_job(
    job_dir: Path, chosen: ModelFolder, recipe: Recipe, sets: dict[str, Path], *, device: str, threads: int
) -> JobSpec:
    """Write a job's folder as a worker's supervisor does, and return its spec. The model and data are linked, not copied."""
    for name in (SOURCE_DIR, DATA_DIR, WORK_DIR, OUT_DIR):
        (job_dir / name).mkdir(exist_ok=True)
    files: list[FileEntry] = []
    for name, path in chosen.files.items():
        (job_dir / SOURCE_DIR / name).parent.mkdir(exist_ok=True, parents=True)
        _place(path, job_dir / SOURCE_DIR / name)
        files.append(describe_file(job_dir / SOURCE_DIR, job_dir / SOURCE_DIR / name))
    data: dict[str, str] = {}
    for index, (name, path) in enumerate(sets.items()):
        target = f"{index}-{path.name}"
        _place(path, job_dir / DATA_DIR / target)
        data[name] = target
    spec = JobSpec.model_validate(
        {
            "job_id": new_id("job"),
            "attempt": 1,
            "model_name": chosen.name,
            "model_digest": digest_of(files),
            "recipe": recipe,
            "packages": catalog.providers_of(options.name for options in recipe.passes),
            "data": data,
            "device": device,
            "threads": threads,
        }
    )
    spec.save(job_dir)
    return spec


def _place(source: Path, target: Path) -> None:
    """Make a hard link where the file system allows it, else a copy: a large model is only read."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)


def run_here(job_dir: Path, *, quiet: bool) -> Manifest:
    """Run the pipeline on a job's folder, print its progress unless `quiet`, and return the manifest."""
    bar = output.job_progress() if output.stderr().is_terminal and not quiet else None
    with bar or nullcontext():
        if bar is None:
            return _pipeline(job_dir, _ignore if quiet else _lines())
        task = bar.add_task("starting", total=1.0, message="")

        def draw(frame: AnyFrame) -> None:
            if isinstance(frame, Progress):
                message = output.clean(frame.message)[:60]
                bar.update(task, description=frame.phase, completed=frame.fraction, message=message)
            elif isinstance(frame, Log) and frame.level in {"warning", "error"}:
                output.note(f"{frame.level}: {frame.text}", "yellow")

        return _pipeline(job_dir, draw)


def _pipeline(job_dir: Path, emit: Callable[[AnyFrame], None]) -> Manifest:
    # Imported late, because this loads torch.
    from nightpress.core.compress.pipeline import run

    return run(job_dir, emit)


def _ignore(_frame: AnyFrame) -> None:
    return None


def _lines() -> Callable[[AnyFrame], None]:
    """Print a line at each new phase or pass."""
    last: object = None

    def write(frame: AnyFrame) -> None:
        nonlocal last
        if isinstance(frame, Progress) and (frame.phase, frame.pass_index) != last:
            last = (frame.phase, frame.pass_index)
            output.note(f"{frame.fraction:4.0%}  {frame.phase}  {frame.message}")
        elif isinstance(frame, Log) and frame.level in {"warning", "error"}:
            output.note(f"{frame.level}: {frame.text}")

    return write
