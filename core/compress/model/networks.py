"""Whole transformers models in memory: loads one from a folder, makes a smaller student from a teacher, and saves one to a folder."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nightpress.core.compress.model.checkpoint import SAFETENSORS_DTYPES, TORCH_DTYPES, disk_errors, sync_folder
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.modules import quiet, take_own_shapes
from nightpress.core.compress.model.rows import find_rows
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.anatomy import OWN_SHAPES
from nightpress.core.recipes.header import ModelHeader

#: Keys of config.json whose lists have an entry for each block.
_BY_BLOCK = ("layer_types", "no_rope_layers", "mlp_layer_types")


def load_model(folder: Path, header: ModelHeader, *, attention: str | None = None) -> Any:
    """Load the model of a folder with the head of its task, in float32, in evaluation mode, on the CPU.

    attention: transformers' name of the attention kernel. Raises NightpressError(malformed_model).
    """
    import transformers

    try:
        with quiet():
            model = getattr(transformers, header.kind.loader).from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=OWN_SHAPES in header.config,
            )
        if OWN_SHAPES in header.config:
            take_own_shapes(model, SourceTensors.in_folder(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NightpressError(
            ErrorCode.MALFORMED_MODEL,
            f"The model can't be loaded: {str(error)[:300]}",
            hint="Check that its config.json and weights belong together.",
        ) from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.eval()


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Cast the model's parameters. Buffers keep their dtype: bfloat16 would change the angles of the rotary embeddings."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def save_model(model: Any, source: Path, target: Path, header: ModelHeader) -> None:
    """Save the model to `target`: weights, config, and the other files of the folder `source`.

    The dtype of the weights is that of most of the source's bytes. Raises NightpressError(disk_full).
    """
    counts: dict[str, int] = {}
    for tensor in header.tensors:
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.size
    dtype = TORCH_DTYPES[max(counts, key=lambda dtype_name: counts[dtype_name])] if counts else torch.float32
    with disk_errors():
        target.mkdir(parents=True, exist_ok=True)
        copy_companions(source, target)
        stored = copy.deepcopy(model).to("cpu", dtype if dtype in SAFETENSORS_DTYPES else torch.float32)
        if hasattr(stored.config, "use_cache"):
            stored.config.use_cache = True
        stored.save_pretrained(target, max_shard_size="5GB")
        sync_folder(target)


def grow_student(teacher: Any, changes: Mapping[str, Any], layer_map: Sequence[int], *, seed: int) -> Any:
    """Make a student with the teacher's config, except for `changes`, and with a block for each entry of `layer_map`.

    Block i gets the tensors of the teacher's block layer_map[i]. Tensors whose shapes differ from the teacher's are initialised at random
    by `seed`.
    """
    config = type(teacher.config).from_dict(teacher.config.to_dict() | dict(changes))
    for key in _BY_BLOCK:
        listed = getattr(teacher.config, key, None)
        if isinstance(listed, list):
            setattr(config, key, [listed[at] for at in layer_map])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(teacher)(config)
    student.to(next(teacher.parameters()).dtype)
    path, _ = find_blocks(teacher)
    theirs: Mapping[str, torch.Tensor] = teacher.state_dict()
    taken = {}
    for name, tensor in student.state_dict().items():
        origin = name
        if name.startswith(path + "."):
            number, _, rest = name.removeprefix(path + ".").partition(".")
            origin = f"{path}.{layer_map[int(number)]}.{rest}"
        if origin in theirs and theirs[origin].shape == tensor.shape:
            taken[name] = theirs[origin].clone()
    student.load_state_dict(taken, strict=False)
    return student.eval()


def find_blocks(model: Any) -> tuple[str, nn.ModuleList]:
    """The path of a model's only row of blocks, and the row. Raises NightpressError(unsupported_architecture) if there are several rows."""
    rows = find_rows(model)
    if len(rows) != 1:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"The model has {len(rows)} rows of blocks, so its blocks can't be told by a number.",
            hint="Take an encoder or a decoder alone.",
        )
    return rows[0]


def embeddings_of(model: Any) -> list[nn.Parameter]:
    """The parameters of all embedding layers: tokens, positions and types. Tied output heads share them."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            found |= {id(parameter): parameter for parameter in module.parameters()}
    return list(found.values())
