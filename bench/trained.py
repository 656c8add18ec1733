"""The models of bench.train: stored as the changed tensors, restored from these, and evaluated on the test rows."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from nightpress.core.compress.data.examples import Examples, collate, read_examples
from nightpress.core.compress.model.checkpoint import read_shards
from nightpress.core.compress.model.networks import load_model
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.recipes.inspect import FolderFiles, inspect_model


def test_rows(model: Path, file: Path) -> Examples:
    header = inspect_model(FolderFiles(model))
    return read_examples(model, header, "test", file, length=128, labelled=True)


def accuracy(folder: Path, source: Path, test: Examples, device: str = "cpu") -> float:
    """The fraction of test rows that the model classifies correctly; a model with early exits runs at full depth."""
    config = json.loads((folder / "config.json").read_bytes())
    model = load_model(folder, inspect_model(FolderFiles(source)).model_copy(update={"config": config})).to(device)
    right = 0
    with torch.inference_mode():
        for start in range(0, len(test), 50):
            batch = collate(test, np.arange(start, min(start + 50, len(test))), torch.device(device))
            logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            right += int((logits.argmax(-1) == batch.labels).sum())
    return right / len(test)


def ship(model: Path, folder: Path, out: Path, *, rows: bool = False) -> None:
    """Write to `out` the tensors that differ from the source's, in float16, and the small files that differ.

    Tensors are split into files of at most 15 MB; a larger tensor gets its own file. rows: of matrices that kept their shape, only the rows
    that changed are written, their change in 8 bits.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = SourceTensors(read_shards(model))
    after = SourceTensors(read_shards(folder))
    parts: list[dict[str, torch.Tensor]] = [{}]
    for name in after.names():
        tensor = after.read(name)
        if name in before and torch.equal(before.read(name).float(), tensor.float()):
            continue
        half = tensor.half() if tensor.is_floating_point() else tensor
        shipped = {name: half}
        if rows and name in before and tensor.dim() == 2 and before.read(name).shape == tensor.shape:
            shipped = _changed_rows(name, before.read(name).float(), tensor.float())
        if sum(part.nbytes for part in [*parts[-1].values(), *shipped.values()]) > 15_000_000:
            parts.append({})
        parts[-1] |= shipped
    for at, part in enumerate(parts):
        save_file(part, out / f"changed-{at}.safetensors")
    (out / "names.json").write_text(json.dumps(after.names()))
    if (folder / "exits").is_dir():
        shutil.copytree(folder / "exits", out / "exits", dirs_exist_ok=True)
    for file in folder.iterdir():
        same = model / file.name
        if file.suffix in {".safetensors"} or file.name.endswith("index.json") or not file.is_file():
            continue
        if not same.is_file() or same.read_bytes() != file.read_bytes():
            shutil.copyfile(file, out / file.name)


def _changed_rows(name: str, before: torch.Tensor, after: torch.Tensor) -> dict[str, torch.Tensor]:
    """The changed rows of a matrix, and their change in steps of a 127th of its largest."""
    change = after - before
    rows = (change != 0).any(1).nonzero()[:, 0]
    scales = change[rows].abs().amax(1, keepdim=True) / 127
    return {
        f"{name}.changed_rows": rows.int(),
        f"{name}.steps": torch.round(change[rows] / scales).to(torch.int8),
        f"{name}.scales": scales,
    }


def _restored(name: str, before: SourceTensors, changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if name in changed:
        return changed[name]
    tensor = before.read(name)
    if f"{name}.steps" not in changed:
        return tensor
    whole = tensor.float()
    whole[changed[f"{name}.changed_rows"].long()] += changed[f"{name}.scales"] * changed[f"{name}.steps"]
    return whole.to(tensor.dtype)


def unship(model: Path, shipped: Path, folder: Path) -> None:
    """Restore the whole model in `folder`, from the source `model` and the files that `ship` wrote."""
    folder.mkdir(parents=True)
    before = SourceTensors(read_shards(model))
    changed = {name: tensor for file in sorted(shipped.glob("changed-*")) for name, tensor in load_file(file).items()}
    names = json.loads((shipped / "names.json").read_text())
    whole = {name: _restored(name, before, changed) for name in names}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for origin in (model, shipped):
        for file in origin.iterdir():
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            elif file.suffix != ".safetensors" and file.name not in {"names.json", "model.safetensors.index.json"}:
                shutil.copyfile(file, folder / file.name)
