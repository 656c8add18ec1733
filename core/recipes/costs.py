"""What executors take, from a model's header alone: bytes of memory and seconds."""

import math
import re
from typing import NamedTuple

from nightpress.core.recipes.block_peak import gpu_peak, input_of, searched_bytes
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import CONV1D, MIXTURES, SHARED_BLOCKS, ModelHeader
from nightpress.core.recipes.placement import Queue

_MIB = 1024**2
#: Anonymous memory, as the supervisor weighs it, measured by `bench.estimates`: of a job's child with torch and its tokenizer loaded …
RUNTIME_BYTES = 205 * _MIB
MODELLING_BYTES = (
    110 * _MIB
)  #: … what a pass that runs the model leaves in it: transformers' classes and heaps that don't shrink …
TRACED_BYTES = 195 * _MIB  #: … what tracing leaves: torch's exporter, transformers' classes …
TRACED_BLOCK_BYTES = 10 * _MIB  #: … for each block of the model …
TRACING_BYTES = 385 * _MIB  #: … and what it and the passes on a graph that try layers leave.
CONSUMER_BYTES = 265 * _MIB  #: a process with torch and transformers, beside the model it loads
GRAPH_CONSUMER_BYTES = 40 * _MIB  #: one with a graph runtime
LOGIT_BYTES = 256 * _MIB  #: logits over the vocabulary that a consumer holds at once
CORE_RATE = 16.5e9  #: multiply-adds/s on each core, of fp32 or, where the processor has it, of bfloat16: between what both come to
GPU_RUNTIME_BYTES = 600 * _MIB  #: of a GPU's memory: CUDA's context and its libraries' kernels and workspaces
GPU_CHILD_BYTES = 745 * _MIB  #: of the host's memory, in a child that has used a GPU: CUDA's libraries …
KERNELS_BYTES = 225 * _MIB  #: … and where Triton has compiled a kernel, its compiler.
GPU_CONSUMER_BYTES = 225 * _MIB  #: what a consumer's process with a CUDA build of torch holds beyond CONSUMER_BYTES
GPU_START_S = 15.0  #: starting CUDA and compiling kernels
GPU_RATE = 250e12  #: multiply-adds/s of bf16 that a calibration comes to on an H100, its kernels' waiting included
_GRAM_EFFORT = 1.25  #: of strips up to the diagonal, for the half that is asked for
_SOLVE_EFFORT = 3.0  #: settling columns moves memory as much as it multiplies
_BATCH_WIDTHS = 6  #: of intermediate results that one batch holds
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
_STREAM_BYTES = 80 * 1024**2  #: row chunks and write buffers of the stream executor
_STREAM_RATE = 0.4e9  #: bytes/s read, rounded and written with fsync on two cores
BATCH_TOKENS = {
    "cuda": 16384,
    "cpu": 1024,
}  #: of the blocks executor: enough to fill the device; more only costs memory
_PINNED_BLOCKS = 3  #: that is run, that is read ahead, and whose memory isn't given out again yet
_CACHED_BLOCK_S = 1.2  #: of tracing a block with a key/value cache
GRAPH_TOKENS = 1024  #: of calibration text that run through a graph at a time
TRIAL_TOKENS = (
    2048  #: of text held apart, on which a trial of a quantized graph is judged; a kind of layer, on a quarter
)
_TRIALS = 2.5  #: forward passes in float that ten trials of quantized graphs take the time of
#: The blocks executor settles a block in one forward pass where its texts, waiting in the middle of it, take no more than this.
IN_TURN_BYTES = {"cuda": 4 * 1024**3, "cpu": 1024**3}


def made_graph_bytes(header: ModelHeader, runtime: str, *, rounded: bool, mapped: bool) -> int:
    """What the child holds at most while it makes a graph, beside RUNTIME_BYTES. mapped: the model to trace is its file, in fp32; else it is held, too.

    Writing the trace down, the model and its serialised copy are there. OpenVINO's graph is changed where it lies, with the floats that rounding
    its largest matrix takes. ONNX Runtime's quantizer copies a model again and again: on models of 17 to 508 MiB, it held nearly six times
    their weights.
    """
    whole, matrices = (
        4 * header.parameters,
        [4 * math.prod(tensor.shape) for tensor in header.tensors if len(tensor.shape) == 2],
    )
    trace = TRACED_BYTES + TRACED_BLOCK_BYTES * _shape(header).blocks + (2 if mapped else 3) * whole
    if not rounded:
        return trace
    if runtime == "openvino":
        return trace + 35 * _MIB + 3 * max(matrices, default=0)
    # A table that is looked up in and multiplied by stands in the graph twice.
    held = whole + (4 * math.prod(header.tied_table.shape) if header.tied_table is not None else 0)
    return max(TRACED_BYTES + 75 * _MIB + int(3.2 * held), 53 * _MIB + int(5.8 * held))


def cached_trace_seconds(header: ModelHeader) -> float:
    """What tracing a model with a key/value cache takes longer than another."""
    return _CACHED_BLOCK_S * _shape(header).blocks if header.is_decoder else 0.0


class Cost(NamedTuple):
    memory_bytes: int  #: anonymous, of the host, beside RUNTIME_BYTES
    seconds: float  #: of reading, writing, and what neither more cores nor a GPU speed up
    work: float = 0.0  #: multiply-adds on the device that the job runs on
    gpu_bytes: int = 0  #: of the GPU's memory, if the job runs on one
    host_bytes: int | None = None  #: of the host's memory, if the job runs on a GPU; None: the same as without
    host_work: float = 0.0  #: multiply-adds on the processor, whatever the job runs on

    def held(self, queue: Queue) -> int:
        """Bytes of the host's memory."""
        return self.memory_bytes if queue == "cpu" or self.host_bytes is None else self.host_bytes

    def lasts(self, queue: Queue, threads: int) -> float:
        """Seconds."""
        cores = CORE_RATE * threads
        return self.seconds + self.host_work / cores + self.work / (GPU_RATE if queue == "gpu" else cores)


def in_turn_bytes(tokens: int, width: int, widest: int, itemsize: int) -> int:
    """What waiting texts hold of a block's intermediate results: queries, keys, values and residual, or the feed-forward's products."""
    return tokens * itemsize * (4 * width + 2 * widest)


def stream_cost(header: ModelHeader) -> Cost:
    """One sweep over the weights."""
    return Cost(_STREAM_BYTES, header.size / _STREAM_RATE)


def blocks_cost(
    header: ModelHeader,
    calibration: Calibration,
    *,
    gram: bool = True,
    bits: int | None = None,
    by_group: bool = True,
    copies: bool = False,
) -> Cost:
    """The blocks executor's: one forward pass over the calibration text where its texts may wait in the middle of a block, else two.

    gram: the method sums up Σ xxᵀ of each layer's inputs (half of it: it is symmetric). bits: of the codes that it leaves; None: it leaves
    weights. by_group: it settles the layers behind each tensor by themselves; else, and for mixtures, what is known of all inputs of a
    block is held at once. copies: it holds a block's weights once more, in float32, and searches in copies of them.
    """
    shape = _shape(header)
    length = min(calibration.length, header.positions or calibration.length)
    tokens = calibration.samples * length
    waiting = in_turn_bytes(tokens, shape.width, shape.widest, 4)
    at_once = not by_group or header.model_type in MIXTURES | SHARED_BLOCKS
    in_turn = waiting <= IN_TURN_BYTES["cpu"] and not at_once
    work: float = (1 if in_turn else 2) * tokens * shape.linear_weights
    work += tokens * length * shape.width * shape.blocks  # attention: half of QKᵀ and of its product with V
    if gram:
        work += tokens * shape.distinct_squares / 2 * _GRAM_EFFORT + _SOLVE_EFFORT * shape.solving
    held = (
        2 * shape.largest_block
        + 4 * 4 * shape.widest**2 * gram
        + (0 if in_turn else shape.stored_block + 4 * (shape.block_squares - shape.widest**2) * gram)
        + (shape.largest_block + searched_bytes(header)) * copies
        + _BATCH_WIDTHS * BATCH_TOKENS["cpu"] * shape.widest * 4
    )
    activations = 4 * tokens * shape.width
    memory = activations + max(2 * shape.largest_outside, held + (waiting if in_turn else 0))
    gpu = gpu_peak(
        header,
        tokens,
        shape.width,
        batch=BATCH_TOKENS["cuda"],
        in_turn_bytes=IN_TURN_BYTES["cuda"],
        gram=gram,
        bits=bits,
        by_group=by_group,
    )
    host = GPU_CHILD_BYTES + KERNELS_BYTES * gram + _PINNED_BLOCKS * shape.pinned_block
    return Cost(memory, header.size / _STREAM_RATE, work, gpu, host)


def graph_cost(header: ModelHeader, calibration: Calibration) -> Cost:
    """Ranges and Gram matrices of a traced graph's layers in one forward pass, their weights settled, and trials on texts held apart."""
    shape = _shape(header)
    length = min(calibration.length, header.positions or calibration.length)
    tokens = calibration.samples * length
    linears = sum(
        len(tensor.shape) == 2 and re.search(r"\.\d+\.", tensor.name) is not None for tensor in header.tensors
    )
    work: float = (tokens + _TRIALS * TRIAL_TOKENS) * shape.linear_weights
    work += tokens * shape.distinct_squares / 2 * _GRAM_EFFORT + _SOLVE_EFFORT * shape.solving
    # The graph and what a session and its loading hold of it; all Gram matrices; the inputs of all layers, for one batch; what tracing left.
    memory = 4 * 4 * header.parameters + 4 * shape.distinct_squares
    memory += 4 * max(GRAPH_TOKENS, length) * linears * shape.widest + TRACING_BYTES
    return Cost(memory, 3 * header.size / _STREAM_RATE, work)


class _Shape(NamedTuple):
    """What of a model its calibration's cost depends on. Bytes are of float32."""

    blocks: int
    width: int  #: of the hidden states
    widest: int  #: inputs of a layer
    linear_weights: int  #: in blocks, as often as a token meets them
    distinct_squares: int  #: Σ n² over the distinct inputs of layers, each as often as a token comes to it
    block_squares: int  #: Σ n² over all distinct inputs of one block, the most of any
    solving: int  #: Σ n³/3 over distinct inputs and m·n²/2 over weights
    largest_block: int
    stored_block: int  #: the same as it is in the file
    largest_outside: int
    pinned_block: int  #: as stored, each tensor in a power of two: so torch gives out memory that a GPU reads


def _shape(header: ModelHeader) -> _Shape:
    blocks: dict[str, int] = {}
    stored: dict[str, int] = {}
    pinned: dict[str, int] = {}
    distinct: set[tuple[str, str, int]] = set()
    outside = widest = solving = 0
    weights = 0.0
    experts = int(header.config.get("num_local_experts") or header.config.get("num_experts") or 1)
    chosen = int(header.config.get("num_experts_per_tok") or 1)
    runs = int(header.config.get("num_hidden_layers") or 1) if header.model_type in SHARED_BLOCKS else 1
    for tensor in header.tensors:
        found = re.match(r".*?\.\d+\.", tensor.name)
        size = 4 * math.prod(tensor.shape)
        if found is None:
            outside = max(outside, size)
            continue
        blocks[found[0]] = blocks.get(found[0], 0) + size
        stored[found[0]] = stored.get(found[0], 0) + tensor.size
        pinned[found[0]] = pinned.get(found[0], 0) + 2 ** max(0, tensor.size - 1).bit_length()
        if len(tensor.shape) != 2:
            continue
        rows, columns = reversed(tensor.shape) if header.model_type in CONV1D else tensor.shape
        weights += runs * math.prod(tensor.shape) * (chosen / experts if ".experts." in tensor.name else 1)
        widest = max(widest, columns)
        solving += rows * columns**2 // 2
        distinct.add((found[0], input_of(tensor.name), columns))
    width = next((int(header.config[name]) for name in _WIDTHS if header.config.get(name)), widest)
    squares = sum(columns**2 * (chosen / experts if ".experts." in name else 1) for _, name, columns in distinct)
    together: dict[str, int] = {}
    for block, _, columns in distinct:
        together[block] = together.get(block, 0) + columns**2
    solving += sum(columns**3 // 3 for _, _, columns in distinct)
    largest = max(blocks.values(), default=0)
    return _Shape(
        len(blocks),
        width,
        widest,
        int(weights),
        int(squares * runs),
        max(together.values(), default=0),
        solving,
        largest,
        max(stored.values(), default=0),
        outside,
        max(pinned.values(), default=0),
    )
