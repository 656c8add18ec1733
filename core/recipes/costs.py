"""What executors take, from a model's header alone: bytes of memory and seconds."""

import math
import re
from typing import NamedTuple

from core.recipes.calibration import Calibration
from core.recipes.header import ModelHeader

RUNTIME_BYTES = (
    600 * 1024**2
)  #: a child with torch and one consumer imported, measured: resident memory before any model
FORWARD_RATE = 25e9  #: multiply-adds/s of fp32 on two cores
_STREAM_BYTES = 300 * 1024**2  #: row chunks and write buffers of the stream executor
_STREAM_RATE = 0.4e9  #: bytes/s read, rounded and written with fsync on two cores
BATCH_TOKENS = {
    "cuda": 16384,
    "cpu": 2048,
}  #: of the blocks executor: enough to fill the device; more only costs memory
#: The blocks executor settles a block in one forward pass where its texts, waiting in the middle of it, take no more than this.
IN_TURN_BYTES = {"cuda": 4 * 1024**3, "cpu": 1024**3}


class Cost(NamedTuple):
    memory_bytes: int  #: beside RUNTIME_BYTES
    seconds: float


def in_turn_bytes(tokens: int, width: int, widest: int, itemsize: int) -> int:
    """What waiting texts hold of a block's intermediate results: queries, keys, values and residual, or the feed-forward's products."""
    return tokens * itemsize * (4 * width + 2 * widest)


def stream_cost(header: ModelHeader) -> Cost:
    """One sweep over the weights."""
    return Cost(_STREAM_BYTES, header.size / _STREAM_RATE)


def blocks_cost(header: ModelHeader, calibration: Calibration) -> Cost:
    """Two forward passes of all blocks over the calibration text; the Gram matrices cost about as much as one."""
    work = 3 * calibration.samples * calibration.length * header.parameters
    return Cost(_blocks_bytes(header, calibration), header.size / _STREAM_RATE + work / FORWARD_RATE)


def _blocks_bytes(header: ModelHeader, calibration: Calibration) -> int:
    """What the blocks executor holds: the embeddings, or two blocks with one layer's Gram matrix and its factor, beside the activations."""
    blocks: dict[str, int] = {}
    outside = widest = 0
    for tensor in header.tensors:
        found = re.match(r".*?\.\d+\.", tensor.name)
        size = 4 * math.prod(tensor.shape)
        if found is None:
            outside = max(outside, size)
            continue
        blocks[found[0]] = blocks.get(found[0], 0) + size
        if len(tensor.shape) == 2:
            widest = max(widest, tensor.shape[1])
    width = int(header.config.get("hidden_size") or header.config.get("dim") or widest)
    activations = 4 * calibration.samples * calibration.length * width
    return activations + max(outside, 2 * max(blocks.values(), default=0) + 4 * 4 * widest**2)
