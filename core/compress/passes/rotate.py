"""Rotations merged into the weights: the hidden states between the blocks, and the values of each attention head, are turned.

Let Q be orthogonal and h a hidden state. The embeddings give hQ. An RMSNorm without a weight gives the same for hQ as for h, times Q; its
weight γ goes into the layers behind it. They get W diag(γ) Q in place of W. Layers that write to the hidden states get QᵀW. So each block
answers the same, times Q, and the output head undoes it. QuaRot (arXiv 2404.00456), section 4; SpinQuant (arXiv 2405.16406), section 3.1.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.grids.grid import Grid
from nightpress.core.compress.grids.rounding import dequantize, round_to_grid
from nightpress.core.compress.model.checkpoint import (
    Shard,
    ShardWriter,
    read_shards,
    tensor_bytes,
    write_file,
    write_index,
    write_json,
)
from nightpress.core.compress.model.companions import copy_companions
from nightpress.core.compress.model.skeleton import Skeleton
from nightpress.core.compress.model.source import SourceTensors
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.solvers.hadamard import Rotation
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.passes import Rotate
from nightpress.core.recipes.passes.rotate import HEAD, LAST_NORM, TABLE, UNREAD, is_tied

_PROBE = 64  #: random tokens on which both models are compared
_PROBED_WORDS = 8192  #: rows of the output head that are compared
#: Least cosine of the answers: that of exact rotations, and what storing all weights in 16 bits once more leaves.
_LEAST = {"F32": 0.9999, "F16": 0.999, "BF16": 0.999}
_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_NORM_OF = {layer: norm for norm, layers in _NORMS.items() for layer in layers}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@folder_pass(Rotate)
def rotate(source: Path, target: Path, options: Rotate, context: PassContext) -> PassRecord:
    """Rotate a model. `target` becomes a float model that answers the same. A killed attempt goes on behind its last finished shard."""
    start = time.monotonic()
    target.mkdir(parents=True, exist_ok=True)
    shards = read_shards(source)
    turning = _Turning.of(SourceTensors(shards), options, context)
    digest = hashlib.sha256(f"{options.model_dump_json()}\n{context.seed}\n{target.name}".encode())
    for shard in shards:
        digest.update(shard.header)
    records = context.work_dir / "rotated" / digest.hexdigest()[:16]
    records.mkdir(parents=True, exist_ok=True)
    sums = [0.0, 0.0, 0.0]
    for number, shard in enumerate(shards):
        out, record = target / shard.path.name, records / f"{shard.path.name}.json"
        context.progress(0.8 * number / len(shards), f"rotating file {number + 1} of {len(shards)}")
        body = json.loads(record.read_bytes()) if record.exists() and out.exists() else None
        if body is None or body["size"] != out.stat().st_size:
            found = _write(shard, out, turning, context, (0.8 * number / len(shards), 0.8 / len(shards)))
            body = {"size": out.stat().st_size, "sums": found}
            write_file(record, json.dumps(body).encode())
            context.whole(number + 1, out, record)
        sums = [total + more for total, more in zip(sums, body["sums"], strict=True)]
    write_index(target)
    copy_companions(source, target)
    _untie(target)
    context.progress(0.8, "comparing the answers")
    cosine = answers_alike(source, target, context.header)
    least = min(_LEAST[tensor.dtype] for tensor in context.header.tensors)
    if cosine < least:
        raise NightpressError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"The rotated model answers otherwise than its source (cosine {cosine:.5f}, at least {least} is needed).",
            hint="Leave `rotate` out: this model's blocks are not as its family's name says.",
        )
    context.progress(1.0, "done")
    norm, before, after = sums
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "cosine": cosine,
            "rounding_error_before": (before / norm) ** 0.5 if norm else 0.0,
            "rounding_error_after": (after / norm) ** 0.5 if norm else 0.0,
            "bytes_before": sum(tensor.size for tensor in context.header.tensors),
            "bytes_after": sum(tensor.info.size for shard in read_shards(target) for tensor in shard.tensors),
        },
    )


@dataclass(frozen=True)
class _Turning:
    """What becomes of each tensor."""

    source: SourceTensors
    hidden: Rotation
    values: Rotation | None  #: of the width of an attention head
    head_width: int
    tied: bool

    @classmethod
    def of(cls, source: SourceTensors, options: Rotate, context: PassContext) -> "_Turning":
        config = context.header.config
        width = int(config["hidden_size"])
        head = int(config.get("head_dim") or width // int(config["num_attention_heads"]))
        values = Rotation(head, context.seed + 1) if options.values else None
        return cls(source, Rotation(width, context.seed), values, head, is_tied(context.header))

    def outputs(self, info: TensorInfo) -> tuple[TensorInfo, ...]:
        """The tensors that replace a tensor: itself, and behind a tied table the output head."""
        if info.name == TABLE and self.tied:
            return info, replace(info, name=HEAD)
        return (info,)

    def __call__(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that replace a tensor, in float32."""
        tensor = self.source.read(name).float()
        if name == TABLE:
            yield name, self.hidden(tensor)
            if self.tied:
                yield HEAD, self._reader(tensor, LAST_NORM)
        elif name == HEAD:
            yield name, self._reader(tensor, LAST_NORM)
        elif name.endswith(UNREAD):
            yield name, tensor
        elif name == LAST_NORM or name.endswith("_layernorm.weight"):
            yield name, torch.ones_like(tensor)
        else:
            yield name, self._of_a_block(name, tensor)

    def _of_a_block(self, name: str, tensor: Tensor) -> Tensor:
        module, _, leaf = name.rpartition(".")
        parts = module.split(".", 3)  # model, layers, number, layer
        layer, block = parts[3], ".".join(parts[:3])
        if layer in _NORM_OF and leaf == "weight":
            tensor = self._reader(tensor, f"{block}.{_NORM_OF[layer]}.weight")
        if self.values is not None and layer == "self_attn.v_proj":
            heads = tensor.reshape(
                -1, self.head_width, *tensor.shape[1:]
            )  # [heads, width, in], or [heads, width] of a bias
            turned = self.values(heads.transpose(1, -1))
            tensor = turned.transpose(1, -1).flatten(0, 1)
        if self.values is not None and layer == "self_attn.o_proj" and leaf == "weight":
            tensor = self.values(tensor.reshape(len(tensor), -1, self.head_width)).flatten(1)
        if layer in _WRITERS:
            tensor = self.hidden(tensor.t()).t()
        return tensor

    def power(self, name: str) -> Tensor | None:
        """The weight of the norm before a layer of a block, float32 [in]. None: no norm is before it."""
        block, _, layer = name.removesuffix(".weight").rpartition(".layers.")[2].partition(".")
        norm = _NORM_OF.get(layer)
        return None if norm is None else self.source.read(f"model.layers.{block}.{norm}.weight").float()

    def _reader(self, weight: Tensor, norm: str) -> Tensor:
        """W diag(γ) Q"""
        return self.hidden(weight * self.source.read(norm).float())


def _write(
    shard: Shard, out: Path, turning: _Turning, context: PassContext, span: tuple[float, float]
) -> tuple[float, float, float]:
    """Write a rotated shard.

    Returns Σ w² of its matrices in blocks, which a rotation keeps, and their squared errors of rounding to int4 before and after. Before,
    a column counts by the norm's weight for its input. So both are the errors of outputs for inputs of equal power behind the norm.
    """
    norm = before = after = 0.0
    infos = [info for stored in shard.tensors for info in turning.outputs(stored.info)]
    with ShardWriter(out, infos) as writer:
        for at, stored in enumerate(shard.tensors):
            original = turning.source.read(stored.name)
            for name, tensor in turning(stored.name):
                value = tensor.to(original.dtype).contiguous()
                writer.write(name, 0, tensor_bytes(value))
            if ".layers." in stored.name and original.dim() == 2:
                was, now = _rounding_error(original, turning.power(stored.name)), _rounding_error(value)
                norm, before, after = norm + was[0], before + was[1], after + now[1]
            context.progress(span[0] + span[1] * (at + 1) / len(shard.tensors), "rotating")
        writer.commit()
    return norm, before, after


def _rounding_error(weight: Tensor, power: Tensor | None = None) -> tuple[float, float]:
    """‖W diag(γ)‖² and ‖(W − Ŵ) diag(γ)‖² of rounding to int4, in groups of 128 inputs where they divide a row. power: γ [in]."""
    weight = weight.float()
    rounded = round_to_grid(weight, Grid(4, 128 if weight.shape[1] % 128 == 0 else None))
    scaled = 1.0 if power is None else power
    lost = (weight - dequantize(rounded.codes, rounded.scale)) * scaled
    return float((weight * scaled).square().sum()), float(lost.square().sum())


def _untie(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    write_json(path, {**config, "tie_word_embeddings": False})


@torch.no_grad()
def answers_alike(source: Path, target: Path, header: ModelHeader) -> float:
    """The cosine of both models' logits on random tokens, in float32 with a block in memory at a time."""
    ids = torch.randint(0, int(header.config["vocab_size"]), (1, _PROBE), generator=torch.Generator().manual_seed(0))
    ours, theirs = (_logits(folder, ids, header) for folder in (target, source))
    return float(F.cosine_similarity(ours.flatten().double(), theirs.flatten().double(), dim=0))


def _logits(folder: Path, ids: Tensor, header: ModelHeader) -> Tensor:
    """Logits [tokens, words] of some words, float32."""
    tensors = SourceTensors.in_folder(folder)
    skeleton = Skeleton(folder, tensors, "cpu", torch.float32, {"input_ids": ids})
    ((hidden, calls),) = skeleton.capture(0, [{"input_ids": ids}], [])
    for index, call in calls:
        block = skeleton.fill_block(index, {name: tensors.read(name) for name in skeleton.block_names(index)})
        out = block(hidden, *call.args, **call.kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        skeleton.empty_block(index)
    normed = F.rms_norm(hidden[0], hidden.shape[-1:], tensors.read(LAST_NORM).float(), header.config["rms_norm_eps"])
    head = tensors.read(HEAD if HEAD in tensors else TABLE)
    return normed @ head[:: -(-len(head) // _PROBED_WORDS)].float().T
