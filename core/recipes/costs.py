"""Estimates of the executors' memory and time, from a model's header alone."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nightpress.core.recipes.block_peak import gpu_peak, input_of, learning_peak, searched_bytes
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.header import CONV1D, SHARED_BLOCKS, ModelHeader
from nightpress.core.recipes.linears import is_expert
from nightpress.core.recipes.placement import Queue

_MIB = 1024**2
#: Anonymous memory, measured by `bench.estimates` as the supervisor counts it: a job's child with torch and its tokenizer loaded.
RUNTIME_BYTES = 205 * _MIB
MODELLING_BYTES = (
    110 * _MIB
)  #: stays in the child after a pass has run the model: transformers' classes, and heaps that don't shrink
TRACED_BYTES = 195 * _MIB  #: stays after tracing: torch's exporter and transformers' classes
TRACED_BLOCK_BYTES = 10 * _MIB  #: stays after tracing, for each block of the model
TRACING_BYTES = 385 * _MIB  #: stays after tracing and after the passes that try quantized graphs
CONSUMER_BYTES = 265 * _MIB  #: a consumer's process with torch and transformers, without the model
GRAPH_CONSUMER_BYTES = 40 * _MIB  #: a consumer's process with a graph runtime, without the model
LOGIT_BYTES = 256 * _MIB  #: limit of logits over the vocabulary that a consumer holds at once
CORE_RATE = (
    16.5e9  #: multiply-adds/s per core: between the measured rates of fp32 and, on processors that have it, bfloat16
)
GPU_RUNTIME_BYTES = 600 * _MIB  #: of a GPU's memory: CUDA's context, and kernels and workspaces of its libraries
GPU_CHILD_BYTES = 745 * _MIB  #: of the host's memory in a child that has used a GPU: CUDA's libraries
KERNELS_BYTES = 225 * _MIB  #: of the host's memory after Triton has compiled a kernel: its compiler
GPU_CONSUMER_BYTES = 225 * _MIB  #: more than CONSUMER_BYTES, in a consumer's process with a CUDA build of torch
GPU_START_S = 15.0  #: starting CUDA and compiling kernels
GPU_RATE = 250e12  #: multiply-adds/s in bf16 that a calibration reaches on an H100, time between kernels included
_GRAM_EFFORT = (
    1.25  #: work per useful multiply-add of a Gram matrix: strips up to the diagonal compute more than the needed half
)
_SOLVE_EFFORT = (
    3.0  #: cost of a multiply-add in the solver, relative to a forward pass's: the solver also moves much memory
)
_JUDGING = 1.5  #: forward passes that judge codes while a block learns: twelve times an eighth of the samples
_STEP_EFFORT = (
    350  #: work per weight of a learning step beside the products, in multiply-adds: rounding, and moving the offsets
)
_ROTATING_EFFORT = 600  #: multiply-adds that take as long as rotating a weight: some twenty passes over it in float64
_BATCH_WIDTHS = 6  #: intermediate results of the widest layer that a batch holds
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
_STREAM_BYTES = 80 * 1024**2  #: row chunks and write buffers of the stream executor
_STREAM_RATE = 0.4e9  #: bytes/s that are read, rounded and written with fsync on two cores
#: Tokens of a batch in the blocks executor: enough to use the whole device; more would only take memory.
BATCH_TOKENS = {"cuda": 16384, "cpu": 1024}
#: How many times as many tokens a batch of a mixture has on a GPU, because each expert gets only a few of them.
_MIXTURE_BATCHES = 4
#: Blocks in pinned memory if the next block is read ahead: the block that runs, the next, and a block whose memory is not yet reused.
_PINNED_BLOCKS = 3
_PINNED_BYTES = 16 * 1024**3  #: limit of these blocks; larger ones are read when their turn comes
_CACHED_BLOCK_S = 1.2  #: seconds of tracing a block with a key/value cache
GRAPH_TOKENS = 1024  #: tokens of calibration text that run through a graph at a time
TRIAL_TOKENS = (
    2048  #: tokens of held-out text on which a trial of a quantized graph is measured; a kind of layer uses a quarter
)
_TIMED_RUNS = 30  #: runs of each graph of a table of times
_TIMED_BYTES = 1_500_000_000  #: of the processes that run a group of such graphs
_TIMED_START_S = 1.5  #: seconds to write and load such a graph in a process of its own
_TRIALS = 2.5  #: time of ten trials of quantized graphs, in forward passes in float
#: The blocks executor settles a block in one forward pass if the intermediate results of all texts take no more bytes than this.
IN_TURN_BYTES = {"cuda": 4 * 1024**3, "cpu": 1024**3}


def batch_tokens(device: str, *, mixture: bool) -> int:
    """Return the tokens of a batch in the blocks executor. device: `cpu` or `cuda`."""
    return BATCH_TOKENS[device] * (_MIXTURE_BATCHES if mixture and device == "cuda" else 1)


def pinned_bytes(blocks: Iterable[Iterable[int]]) -> int:
    """Return the bytes of pinned memory that hold any block of a model. blocks: the sizes of each block's tensors in bytes.

    torch rounds each tensor up to a power of two, and keeps freed memory for later tensors of the same rounded size.
    """
    kept: Counter[int] = Counter()
    for sizes in blocks:
        kept |= Counter(2 ** max(0, size - 1).bit_length() for size in sizes)
    return sum(size * count for size, count in kept.items())


def reads_ahead(pinned: int) -> bool:
    """Whether the blocks executor holds the next block in the host's memory while a GPU runs a block. pinned: bytes of a block."""
    return _PINNED_BLOCKS * pinned <= _PINNED_BYTES


def made_graph_bytes(header: ModelHeader, runtime: str, *, rounded: bool, mapped: bool) -> int:
    """Return the largest number of bytes that the child holds while it makes a graph, without RUNTIME_BYTES.

    mapped: the traced model is mapped from its fp32 file; else its weights are in memory, too. While the trace is written, the model and
    its serialised copy exist. OpenVINO's graph is changed in place, with the floats for rounding its largest matrix. ONNX Runtime's
    quantizer copies the model repeatedly: on models of 17 to 508 MiB it held nearly six times their weights.
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
    # A tied table is in the graph twice: for the lookup, and for the product.
    held = whole + (4 * math.prod(header.tied_table.shape) if header.tied_table is not None else 0)
    return max(TRACED_BYTES + 75 * _MIB + int(3.2 * held), 53 * _MIB + int(5.8 * held))


def cached_trace_seconds(header: ModelHeader) -> float:
    """Return the extra seconds of tracing a model with a key/value cache; 0 for models without a cache."""
    return _CACHED_BLOCK_S * _shape(header).blocks if header.is_decoder else 0.0


class Cost(NamedTuple):
    memory_bytes: int  #: anonymous memory of the host, without RUNTIME_BYTES
    seconds: float  #: reading, writing, and all else that neither more cores nor a GPU makes faster
    work: float = 0.0  #: multiply-adds on the job's device
    gpu_bytes: int = 0  #: memory of the GPU, if the job runs on a GPU
    host_bytes: int | None = None  #: memory of the host, if the job runs on a GPU; None: as `memory_bytes`
    host_work: float = 0.0  #: multiply-adds on the processor, also if the job runs on a GPU
    #: Number of GPUs that share out the work → memory of each of them; None: as much as one needs alone.
    gpu_bytes_on: Callable[[int], int] | None = None

    def each_gpu(self, gpus: int) -> int:
        """Return the bytes of each GPU's memory if so many GPUs share out the work."""
        return self.gpu_bytes if self.gpu_bytes_on is None or gpus <= 1 else self.gpu_bytes_on(gpus)

    def then(self, other: "Cost") -> "Cost":
        """Return the cost of this and then `other`: the larger memory, and the sum of the times."""
        hosts = (
            None if self.host_bytes is None and other.host_bytes is None else max(self.held("gpu"), other.held("gpu"))
        )
        return Cost(
            max(self.memory_bytes, other.memory_bytes),
            self.seconds + other.seconds,
            self.work + other.work,
            max(self.gpu_bytes, other.gpu_bytes),
            hosts,
            self.host_work + other.host_work,
            None
            if self.gpu_bytes_on is None and other.gpu_bytes_on is None
            else lambda gpus: max(self.each_gpu(gpus), other.each_gpu(gpus)),
        )

    def times(self, runs: int) -> "Cost":
        """Return the cost of running it so often, one run after the other."""
        return self._replace(seconds=runs * self.seconds, work=runs * self.work, host_work=runs * self.host_work)

    def held(self, queue: Queue) -> int:
        """Return the bytes of the host's memory."""
        return self.memory_bytes if queue == "cpu" or self.host_bytes is None else self.host_bytes

    def lasts(self, queue: Queue, threads: int) -> float:
        """Return the total seconds in this queue."""
        cores = CORE_RATE * threads
        return self.seconds + self.host_work / cores + self.work / (GPU_RATE if queue == "gpu" else cores)


def in_turn_bytes(tokens: int, width: int, widest: int, itemsize: int) -> int:
    """Return the bytes of intermediate results that all texts hold when a block runs layer by layer.

    These are queries, keys, values and the residual, or the feed-forward's products. tokens: of all texts. width: of the hidden states.
    widest: largest number of inputs of a layer.
    """
    return tokens * itemsize * (4 * width + 2 * widest)


def stream_cost(header: ModelHeader) -> Cost:
    """Return the cost of one sweep over the weights."""
    return Cost(_STREAM_BYTES, header.size / _STREAM_RATE)


def rotating_cost(header: ModelHeader) -> Cost:
    """Return the cost of rotating a model on the processor, one tensor at a time, and of comparing it, one block at a time."""
    shape = _shape(header)
    memory = _STREAM_BYTES + max(4 * shape.largest_outside, 2 * shape.largest_outside + 2 * shape.largest_block)
    work = _ROTATING_EFFORT * header.parameters
    return Cost(memory, 3 * header.size / _STREAM_RATE, host_work=work)


def blocks_cost(
    header: ModelHeader,
    calibration: Calibration,
    *,
    gram: bool = True,
    bits: int | None = None,
    by_group: bool = True,
    in_parts: bool = False,
    copies: bool = False,
) -> Cost:
    """Return the cost of the blocks executor: one forward pass over the calibration text if all texts can stop inside a block, else two.

    gram: the method sums up Σ xxᵀ of each layer's inputs (half of the matrix, because it is symmetric). bits: of the codes that it writes;
    None: it writes weights. by_group: it settles each group of layers with the same inputs alone; else, and for mixtures, the statistics of
    all inputs of a block are held at once. in_parts: it settles a mixture part by part, as the executor does with a method whose
    `Method.by_group` is true: then not all settled weights are held in float32. copies: it holds a second copy of the block's weights, in float32, and
    searches in copies of it.
    """
    shape = _shape(header)
    length = min(calibration.length, header.positions or calibration.length)
    tokens = calibration.samples * length
    waiting = in_turn_bytes(tokens, shape.width, shape.widest, 4)
    at_once = not by_group or header.has_experts or header.model_type in SHARED_BLOCKS
    in_turn = waiting <= IN_TURN_BYTES["cpu"] and not at_once
    work: float = (1 if in_turn else 2) * tokens * shape.linear_weights
    work += tokens * length * shape.width * shape.blocks  # attention: half of QKᵀ, and half of its product with V
    if gram:
        work += tokens * shape.distinct_squares / 2 * _GRAM_EFFORT + _SOLVE_EFFORT * shape.solving
    in_parts = in_parts and header.has_experts
    if in_parts:  # settled weights replace those of the file. The block before is held until it is written
        settled = shape.stored_block if bits is None else shape.largest_block // 4 * bits // 8
    else:
        settled = shape.largest_block
    held = (
        shape.largest_block
        + settled
        + 4 * 4 * shape.widest**2 * gram
        + (0 if in_turn else shape.stored_block + 4 * (shape.block_squares - shape.widest**2) * gram)
        + (shape.largest_block + searched_bytes(header)) * copies
        + _BATCH_WIDTHS * BATCH_TOKENS["cpu"] * shape.widest * 4
    )
    activations = 4 * tokens * shape.width
    memory = activations + max(2 * shape.largest_outside, held + (waiting if in_turn else 0))

    def on_gpus(gpus: int) -> int:
        return gpu_peak(
            header,
            math.ceil(calibration.samples / gpus) * length,
            shape.width,
            batch=batch_tokens("cuda", mixture=header.has_experts),
            in_turn_bytes=IN_TURN_BYTES["cuda"],
            gram=gram,
            bits=bits,
            by_group=by_group,
            in_parts=in_parts,
            gpus=gpus,
        )

    pinned = shape.pinned_block * (_PINNED_BLOCKS if reads_ahead(shape.pinned_block) else 1)
    host = GPU_CHILD_BYTES + KERNELS_BYTES * gram + pinned
    shared = on_gpus if header.has_experts else None
    return Cost(memory, header.size / _STREAM_RATE, work, on_gpus(1), host, gpu_bytes_on=shared)


def learning_cost(header: ModelHeader, calibration: Calibration, *, bits: int, steps: int, batch: int) -> Cost:
    """Return the cost of learning the codes of each block in `steps` steps of `batch` samples, in the blocks executor."""
    once = blocks_cost(header, calibration, bits=bits, by_group=False)
    shape = _shape(header)
    length = min(calibration.length, header.positions or calibration.length)
    tokens = calibration.samples * length
    learned = min(batch, calibration.samples) * length * steps
    # Gradients of weights and of inputs take twice a forward pass. The source's blocks run once; a share of the samples judges the codes.
    work = once.work + (3 * learned + (1 + _JUDGING) * tokens) * shape.linear_weights
    work += 3 * learned * length * shape.width * shape.blocks + _STEP_EFFORT * steps * shape.linear_weights
    memory = learning_peak(header, tokens, shape.width, batch=min(BATCH_TOKENS["cpu"], batch * length), queue="cpu")
    gpu = learning_peak(header, tokens, shape.width, batch=min(BATCH_TOKENS["cuda"], batch * length), queue="gpu")
    return once._replace(
        work=work,
        memory_bytes=max(once.memory_bytes, memory),
        gpu_bytes=max(once.gpu_bytes, gpu),
        gpu_bytes_on=None,  # each process holds all experts, since gradients don't travel between them
    )


def graph_cost(header: ModelHeader, calibration: Calibration) -> Cost:
    """Return the cost of static int8 on a graph: ranges and Gram matrices in one forward pass, the solver, and trials on held-out texts."""
    shape = _shape(header)
    length = min(calibration.length, header.positions or calibration.length)
    tokens = calibration.samples * length
    linears = sum(
        len(tensor.shape) == 2 and re.search(r"\.\d+\.", tensor.name) is not None for tensor in header.tensors
    )
    work: float = (tokens + _TRIALS * TRIAL_TOKENS) * shape.linear_weights
    work += tokens * shape.distinct_squares / 2 * _GRAM_EFFORT + _SOLVE_EFFORT * shape.solving
    # The graph, and its copies in a session and while it loads; all Gram matrices; the inputs of all layers for one batch; TRACING_BYTES.
    memory = 4 * 4 * header.parameters + 4 * shape.distinct_squares
    memory += 4 * max(GRAPH_TOKENS, length) * linears * shape.widest + TRACING_BYTES
    # A graph runs on the processor, whatever the job's device is.
    return Cost(memory, 3 * header.size / _STREAM_RATE, host_work=work)


def reshaping_cost(header: ModelHeader, *, tokens: int, levels: int, shape: int, stages: int) -> Cost:
    """Return the cost of a table of times, and of choosing in each stage what is removed from an encoder by the table.

    tokens: on which errors are measured. levels: widths in the table. shape: tokens of each timed run.
    """
    model = _shape(header)
    # Each module is left out once to see what the loss gains. The solver removes one input after the other.
    work: float = tokens * (2 * model.blocks + 2) * model.linear_weights
    work += tokens * model.distinct_squares / 2 * _GRAM_EFFORT + _SOLVE_EFFORT * 2 * model.solving
    timed = levels * _TIMED_RUNS * shape * model.linear_weights
    work *= stages
    # The student, the teacher and the graph; all Gram matrices; the solver's in float64. Or the processes that are timed, see stopwatch.py.
    memory = 4 * 4 * header.parameters + 4 * model.distinct_squares + 4 * 8 * model.widest**2 + TRACING_BYTES
    host = _TIMED_BYTES + 2 * 4 * header.parameters + TRACING_BYTES
    memory = max(memory, host)
    seconds = levels * _TIMED_START_S
    return Cost(int(memory), seconds, work, gpu_bytes=int(memory), host_bytes=int(host), host_work=timed)


class _Shape(NamedTuple):
    """The sizes of a model on which its calibration's cost depends. Bytes are of float32."""

    blocks: int
    width: int  #: of the hidden states
    widest: int  #: largest number of inputs of a layer
    linear_weights: int  #: weights in all blocks, weighted by how often a token passes them
    distinct_squares: int  #: Σ n² over the distinct inputs of layers, weighted by how often a token reaches them
    block_squares: int  #: Σ n² over the distinct inputs of a block, of the block with the largest sum
    solving: int  #: Σ n³/3 over distinct inputs and m·n²/2 over weights
    largest_block: int  #: bytes of the largest block
    stored_block: int  #: bytes of the largest block in the file's dtypes
    largest_outside: int  #: bytes of the largest tensor outside the blocks
    pinned_block: int  #: bytes of pinned memory that hold any block


def _shape(header: ModelHeader) -> _Shape:
    blocks: dict[str, int] = {}
    stored: dict[str, int] = {}
    sizes: dict[str, list[int]] = {}
    distinct: set[tuple[str, str, int]] = set()
    outside = widest = solving = 0
    weights = 0.0
    share = header.expert_share
    runs = int(header.config.get("num_hidden_layers") or 1) if header.model_type in SHARED_BLOCKS else 1
    for tensor in header.tensors:
        found = re.match(r".*?\.\d+\.", tensor.name)
        size = 4 * math.prod(tensor.shape)
        if found is None:
            outside = max(outside, size)
            continue
        blocks[found[0]] = blocks.get(found[0], 0) + size
        stored[found[0]] = stored.get(found[0], 0) + tensor.size
        sizes.setdefault(found[0], []).append(tensor.size)
        if len(tensor.shape) != 2:
            continue
        rows, columns = reversed(tensor.shape) if header.model_type in CONV1D else tensor.shape
        weights += runs * math.prod(tensor.shape) * (share if is_expert(tensor.name) else 1)
        widest = max(widest, columns)
        solving += rows * columns**2 // 2
        distinct.add((found[0], input_of(tensor.name), columns))
    width = next((int(header.text_config[name]) for name in _WIDTHS if header.text_config.get(name)), widest)
    squares = sum(columns**2 * (share if ".experts." in name else 1) for _, name, columns in distinct)
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
        pinned_bytes(sizes.values()),
    )
