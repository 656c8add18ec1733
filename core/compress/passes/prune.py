"""Pruning passes."""

import shutil
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from core.compress.passes.context import PassContext
from core.handoff.report import LayerEffect, PassRecord
from core.recipes.passes import Magnitude
from core.recipes.plan import is_linear_weight


def magnitude(source: Path, target: Path, options: Magnitude, context: PassContext) -> PassRecord:
    """Set the weights of smallest magnitude to zero; a dense model of the same size comes out."""
    start = time.monotonic()
    target.mkdir(parents=True)
    linears = {one.name for one in context.header.tensors if is_linear_weight(one, options.ignore)}
    layers = []
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, target / path.name)
            continue
        out = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                w = out[name] = file.get_tensor(name)
                if name in linears:
                    before = w.float()
                    smallest = before.abs().flatten().argsort(stable=True)[: round(options.sparsity * w.numel())]
                    w.view(-1)[smallest] = 0
                    error = float((w.float() - before).norm() / before.norm())
                    layers.append(
                        LayerEffect(
                            name=name.removesuffix(".weight"),
                            bytes_before=w.nbytes,
                            bytes_after=w.nbytes,
                            relative_error=error,
                            sparsity=options.sparsity,
                        )
                    )
        save_file(out, target / path.name, metadata={"format": "pt"})
    context.progress(1.0, "pruned")
    return PassRecord(
        index=context.index, name="magnitude", seconds=time.monotonic() - start, summary={}, layers=tuple(layers)
    )
