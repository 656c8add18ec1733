"""`nightpress convert`: make a plain model folder of pickles, an adapter with its base, a quantized model, or a GGUF file."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

import nightpress
from nightpress.client.cli import output
from nightpress.client.cli.press import require_core
from nightpress.client.cli.registration import left_out_text
from nightpress.client.cli.session import Session, takes_session
from nightpress.client.errors import ClientError
from nightpress.client.folders import read_adapter_folder, read_model_folder
from nightpress.core.errors import NightpressError
from nightpress.core.handoff.spec import DATA_DIR, OUT_DIR, SOURCE_DIR, SPEC_FILE, WORK_DIR
from nightpress.core.recipes.filenames import ADAPTER_FILE, ADAPTER_WEIGHTS, INDEX_FILE, WEIGHTS_FILE, is_model_file

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = ("optimizer", "scheduler", "scaler", "training_args", "rng_state")


def add_to(app: typer.Typer) -> None:
    app.command("convert", rich_help_panel="This machine")(takes_session(convert))


def convert(
    session: Session,
    source: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.gguf", help="What to convert.", exists=True)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the model: a new or an empty one.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="FOLDER is an adapter (LoRA): the model that it was trained for.", exists=True, file_okay=False
        ),
    ] = None,
) -> None:
    """Write a model folder that can be pressed: from pickled checkpoints, an adapter and its base, codes, or a GGUF file.

    Pickles are read in a confined process without network and without your files, and only tensors are taken from them.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} exists and is not empty.", param_hint="--out")
    require_core()
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / "model"
        made.mkdir()
        if source.is_file():
            _from_gguf(source, made)
        elif base is not None:
            _merged(source, base, Path(scratch), made)
        elif any((source / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
            _opened(source, made)
        else:
            _unpickled(source, Path(scratch) / "confined", made)
        if not (made / ADAPTER_WEIGHTS).exists():
            read_model_folder(made)
        if out.exists():
            out.rmdir()
        made.replace(out)
    output.print_json({"out": str(out)}) if session.json else output.say(f"The model is in {out}.")


def _from_gguf(path: Path, made: Path) -> None:
    from nightpress.core.compress.convert.gguf_file import convert_gguf

    convert_gguf(path.resolve(), made)


def _merged(adapter: Path, base: Path, scratch: Path, made: Path) -> None:
    from nightpress.core.compress.executors.open_source import open_source

    below = _own_adapter(adapter, scratch)
    chosen = read_model_folder(base)
    read_adapter_folder(below, chosen)
    open_source(_gathered(chosen.files, scratch / "base"), made, lambda _fraction, _what: None, adapter=below)


def _own_adapter(adapter: Path, scratch: Path) -> Path:
    """The adapter's folder; one that is pickled is converted first."""
    if (adapter / ADAPTER_WEIGHTS).is_file() or not (adapter / "adapter_model.bin").is_file():
        return adapter
    made = scratch / "adapter"
    made.mkdir()
    _unpickled(adapter, scratch / "confined", made)
    return made


def _opened(source: Path, made: Path) -> None:
    from nightpress.core.compress.executors.open_source import open_source

    chosen = read_model_folder(source)
    if chosen.header.brought is None:
        raise ClientError(
            f"{source} is a model of floats in safetensors already.", hint="Press it, or bring it, as it is."
        )
    if chosen.left_out:
        output.note(left_out_text(chosen.left_out), "dim")
    open_source(_gathered(chosen.files, made.parent / "source"), made, lambda _fraction, _what: None)


def _gathered(files: dict[str, Path], folder: Path) -> Path:
    """A folder with links to a model's files alone."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _place(path, folder / name)
    return folder


def _unpickled(source: Path, confined: Path, made: Path) -> None:
    """Convert a folder's pickles in a confined process, and copy the model's other files."""
    names = [path.name for path in sorted(source.iterdir()) if path.is_file()]
    pickled = [name for name in names if name.endswith(_PICKLES) and not name.startswith(_NOT_WEIGHTS)]
    if any(name.startswith(("pytorch_model", "adapter_model")) for name in pickled):
        pickled = [name for name in pickled if name.startswith(("pytorch_model", "adapter_model"))]
    if not pickled:
        read_model_folder(source)  # says what the folder is
        raise ClientError(
            f"{source} has nothing to convert.", hint="Name a folder with pytorch_model.bin, or a GGUF file."
        )
    for folder in (SOURCE_DIR, DATA_DIR, WORK_DIR, OUT_DIR, "tmp"):
        (confined / folder).mkdir(parents=True, exist_ok=True)
    (confined / SPEC_FILE).touch()
    for name in pickled:
        _place((source / name).resolve(), confined / SOURCE_DIR / name)
    _run_confined(confined)
    for path in (confined / OUT_DIR).iterdir():
        if path.suffix in {".safetensors", ".json"} and path.is_file() and not path.is_symlink():
            path.replace(made / path.name)
    for name in names:
        if is_model_file(name) and not name.endswith((".safetensors", ".index.json")):
            shutil.copyfile(source / name, made / name)
    if (made / ADAPTER_WEIGHTS).exists() and not (made / ADAPTER_FILE).exists():
        raise ClientError(f"{source} has no {ADAPTER_FILE}.", hint="Bring the whole folder of the adapter.")


def _run_confined(folder: Path) -> None:
    project = Path(nightpress.__file__).resolve().parents[1]
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(project), "HOME": str(folder)}
    command = [sys.executable, "-P", "-m", "nightpress.worker.confined", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        told = done.stderr.strip().splitlines()
        raise ClientError(
            f"The confined process that reads the pickles ended early ({told[-1][:300] if told else f'status {done.returncode}'}).",
            hint="Does the machine have memory for the largest file? Are the files whole?",
        ) from None
    if said:
        raise NightpressError.from_dict(said)


def _place(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        shutil.copyfile(source, target)
