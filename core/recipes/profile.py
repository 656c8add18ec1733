"""The cost of running a model, counted from its header alone: parameters, operations, bytes, key/value cache, and a roofline bound.

Only matrix products are counted, 2 · m · n · k floating-point operations each, as torch's FLOP counter does. Norms, activations and softmax
are a few per cent. A decoder's attention is counted over all pairs of tokens, because its kernels compute all of them before the mask.
"""

import math
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nightpress.core.recipes.anatomy import Anatomy, anatomy_of
from nightpress.core.recipes.header import ModelHeader, TensorInfo
from nightpress.core.recipes.linears import is_linear_weight

Kind = Literal["embeddings", "attention projections", "attention scores", "feed-forward", "norms and biases", "head"]
KINDS: tuple[Kind, ...] = (
    "embeddings",
    "attention projections",
    "attention scores",
    "feed-forward",
    "norms and biases",
    "head",
)
_FLOAT = 4  #: bytes of an activation and of a cached key in fp32, in which models are measured


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Part(_Model):
    """One kind of work in one block, or outside the blocks."""

    block: int | None
    kind: Kind
    parameters: int = Field(ge=0)
    bytes: int = Field(ge=0)  #: bytes of the stored weights
    flops: int = Field(ge=0)  #: operations of one pass over the whole batch


class Device(_Model):
    """The peak rates of a machine, measured or from its manufacturer."""

    name: str
    flops_per_s: float = Field(gt=0)
    bytes_per_s: float = Field(gt=0)


class Shape(_Model):
    """One pass over `batch` texts of `length` tokens. For a decoder, also the step that decodes the next token of each text."""

    batch: int
    length: int
    flops: int
    attention_share: float  #: share of the operations that grow with the square of the length
    moved_bytes: int  #: the weights, and the keys and values that are written
    intensity: float  #: operations per byte
    bound_ms: float | None  #: shortest possible time on the device, by its roofline; None without a device
    limit: Literal["compute", "memory"] | None
    cache_bytes: int | None = None  #: keys and values in fp32 after the pass; None for an encoder
    decode_flops: int | None = None
    decode_moved_bytes: int | None = None  #: the weights and the whole cache, for the next token of all texts
    decode_bound_ms: float | None = None


class Profile(_Model):
    """A model's cost: for each part at the first shape, and in total at every shape."""

    subject: str
    parameters: int
    bytes: int
    parts: tuple[Part, ...] = Field(description="in the model's order, at the first shape")
    shapes: tuple[Shape, ...]
    quadratic_from: int | None  #: length in tokens at which attention's quadratic part is half of a block's operations
    device: Device | None = None


def profile_of(
    header: ModelHeader, subject: str, shapes: list[tuple[int, int]], device: Device | None = None
) -> Profile:
    """Return a model's profile. shapes: (batch, length) each.

    Raises NightpressError(invalid_recipe) for a family whose layout is not known.
    """
    anatomy = anatomy_of(header, "profile")
    first = tuple(_parts(header, anatomy, *shapes[0]))
    return Profile(
        subject=subject,
        parameters=header.parameters,
        bytes=header.size,
        parts=first,
        shapes=tuple(_shape(header, anatomy, batch, length, device) for batch, length in shapes),
        quadratic_from=_quadratic_from(first, shapes[0][1]),
        device=device,
    )


def by_kind(profile: Profile) -> dict[Kind, Part]:
    """Return kind → the sum of the parts of that kind over all blocks."""
    found = {}
    for kind in KINDS:
        same = [part for part in profile.parts if part.kind == kind]
        if same:
            found[kind] = Part(
                block=None,
                kind=kind,
                parameters=sum(part.parameters for part in same),
                bytes=sum(part.bytes for part in same),
                flops=sum(part.flops for part in same),
            )
    return found


def _parts(header: ModelHeader, anatomy: Anatomy, batch: int, length: int) -> Iterator[Part]:
    tokens = batch * length
    sums: dict[tuple[int | None, Kind], list[int]] = {}

    def add(block: int | None, kind: Kind, tensor: TensorInfo | None, flops: int) -> None:
        total = sums.setdefault((block, kind), [0, 0, 0])
        if tensor is not None:
            total[0] += math.prod(tensor.shape)
            total[1] += tensor.size
        total[2] += flops

    for tensor in header.tensors:
        place = anatomy.place(tensor.name)
        block = place[0] if place is not None else None
        if place is not None and is_linear_weight(tensor, ()):
            kind: Kind = "attention projections" if _in_attention(place[1], anatomy) else "feed-forward"
            add(block, kind, tensor, 2 * tokens * math.prod(tensor.shape))
        elif place is None and len(tensor.shape) == 2:
            add(None, *_outside(tensor, header, batch, tokens))
        else:
            add(block, "norms and biases", tensor, 0)
    for index, heads in enumerate(anatomy.heads):
        add(index, "attention scores", None, 4 * batch * length * length * heads * anatomy.head_dim)
    if _tied(header):
        vocabulary = int(header.vocabulary or 0)
        add(None, "head", None, 2 * tokens * vocabulary * _output_width(header, anatomy))
    order = {kind: at for at, kind in enumerate(KINDS)}
    for (block, kind), (parameters, size, flops) in sorted(
        sums.items(),
        key=lambda part: (
            -1 if part[0][0] is None and part[0][1] != "head" else anatomy.layers if part[0][0] is None else part[0][0],
            order[part[0][1]],
        ),
    ):
        yield Part(block=block, kind=kind, parameters=parameters, bytes=size, flops=flops)


def _in_attention(module: str, anatomy: Anatomy) -> bool:
    inner = anatomy.family.attention
    return module == inner.output or any(module == name for name, _ in inner.inputs) or "attention" in module


def _outside(tensor: TensorInfo, header: ModelHeader, batch: int, tokens: int) -> tuple[Kind, TensorInfo, int]:
    """Return (kind, tensor, operations) of a matrix outside the blocks: a lookup table, or a product with every token, or one per text."""
    module = tensor.name.removesuffix(".weight")
    leaf = module.rsplit(".", 1)[-1]
    count = math.prod(tensor.shape)
    if leaf in {"lm_head", "embed_out", "decoder", "vocab_projector"}:
        return "head", tensor, 2 * tokens * count
    if ("embed" in module.lower() and "project" not in module) or leaf in {"wte", "wpe", "relative_attention_bias"}:
        return "embeddings", tensor, 0
    every_token = header.task in {"masked-lm", "token-classification"} and "pooler" not in module
    return "head", tensor, 2 * (tokens if every_token else batch) * count


def _tied(header: ModelHeader) -> bool:
    """Return whether the head over the vocabulary uses the embeddings' matrix: then the files have no matrix for the head."""
    if header.task not in {"causal-lm", "masked-lm"}:
        return False
    heads = ("lm_head.weight", "embed_out.weight", "decoder.weight", "vocab_projector.weight")
    return not any(tensor.name.endswith(heads) for tensor in header.tensors)


def _output_width(header: ModelHeader, anatomy: Anatomy) -> int:
    return int(header.config.get("embedding_size") or header.config.get("word_embed_proj_dim") or anatomy.hidden)


def _shape(header: ModelHeader, anatomy: Anatomy, batch: int, length: int, device: Device | None) -> Shape:
    parts = list(_parts(header, anatomy, batch, length))
    flops = sum(part.flops for part in parts)
    quadratic = sum(part.flops for part in parts if part.kind == "attention scores")
    # Of an embedding table, only the rows of the tokens are read, and they are not counted. All other weights are read completely.
    weights = sum(part.bytes for part in parts if part.kind != "embeddings")
    if _tied(header):
        weights += sum(part.bytes for part in parts if part.kind == "embeddings")
    cache = 2 * _FLOAT * anatomy.head_dim * sum(anatomy.groups) * batch * length if header.is_decoder else None
    moved = weights + (cache or 0)
    decode_flops = decode_moved = None
    if cache is not None:
        decode_flops = (flops - quadratic) // length + quadratic // length
        decode_moved = weights + cache
    return Shape(
        batch=batch,
        length=length,
        flops=flops,
        attention_share=quadratic / flops if flops else 0.0,
        moved_bytes=moved,
        intensity=flops / moved if moved else 0.0,
        bound_ms=_bound(flops, moved, device),
        limit=None
        if device is None
        else "compute"
        if flops / device.flops_per_s >= moved / device.bytes_per_s
        else "memory",
        cache_bytes=cache,
        decode_flops=decode_flops,
        decode_moved_bytes=decode_moved,
        decode_bound_ms=_bound(decode_flops, decode_moved, device)
        if decode_flops is not None and decode_moved is not None
        else None,
    )


def _bound(flops: int, moved: int, device: Device | None) -> float | None:
    """Return the roofline bound in milliseconds: the longer of the times for operations and for bytes (Williams et al., CACM 2009)."""
    return None if device is None else 1000 * max(flops / device.flops_per_s, moved / device.bytes_per_s)


def _quadratic_from(parts: tuple[Part, ...], length: int) -> int | None:
    """Return the length L at which Σ 4 L² h d = Σ 2 L p over the model's blocks: L = Σ p / Σ 2 h d.

    h heads of width d, p parameters of the linear layers. length: of the pass that `parts` describes.
    """
    linear = sum(part.flops for part in parts if part.kind in {"attention projections", "feed-forward"})
    quadratic = sum(part.flops for part in parts if part.kind == "attention scores")
    return round(length * linear / quadratic) if quadratic else None
