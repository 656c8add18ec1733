"""The blocks executor's peak of GPU memory, estimated from a model's header alone.

For each stage of a block, the bytes of the tensors that exist in it are summed. The largest sum is the peak; which stage that is depends on
the model's shape. Traced on an H200 for five shapes of Llama's architecture and a mixture, 2026-11; `python -m bench.blocks_gpu` prints the
estimate beside the measured peak.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from nightpress.core.recipes.header import CONV1D, SHARED_BLOCKS, ModelHeader
from nightpress.core.recipes.linears import is_expert
from nightpress.core.recipes.placement import Queue

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MIB = 1024**2
_WORKSPACE = 34 * _MIB  #: cuBLAS's workspace
_FLOAT = 4
#: Bytes per weight of a group that is settled at once. Rounding holds seven copies in float32 (the weight, what is settled, what is owed,
#: steps, losses, spread and pulled), two of codes in int8, and the weight as stored; pruning holds fewer.
_ROUNDING, _PRUNING = 7 * _FLOAT + 2, 5 * _FLOAT
_SQUARES = 2 * _FLOAT  #: bytes per input whose squares are summed: the input and its square in float32
#: Bytes that groups of equal shape may take while they are settled side by side on a GPU.
_STACK_BYTES = 2 * 1024**3
#: Bytes per weight that learns its rounding: itself and its offset in float32, and three sets of codes (two starts and the best). The weight
#: as stored, its rounded value and its gradient come on top.
_LEARNED = 2 * _FLOAT + 3
#: Queue → bytes per weight of the layer that takes a step. A GPU's kernel takes it in one reading.
_LEARNED_COPIES: dict[Queue, int] = {"cpu": 6 * _FLOAT, "gpu": _FLOAT}
#: Tokens that travel to experts in other processes in one round, if more than one expert of each process takes part in it.
EXCHANGED_TOKENS = 16384
_KEPT_WIDTHS = 8  #: intermediate results as wide as the hidden states that a batch keeps for its gradients, in float32
_SEARCHED_ROWS = 4096  #: rows of a weight that AWQ's search uses
_SEARCHED_COPIES = 5 * _FLOAT  #: bytes of copies per weight in these rows


class _Group(NamedTuple):
    """Layers of a block that read the same inputs."""

    columns: int
    weights: int
    rows: int
    share: float  #: fraction of the tokens that reach the layers; less than 1 for an expert


def stack_size(rows: int, columns: int, groups: int) -> int:
    """Return how many of `groups` groups of weights [rows, columns], each with a Gram matrix of its own, a GPU settles side by side."""
    each = _FLOAT * 4 * columns**2 + _ROUNDING * rows * columns
    return max(1, min(groups, _STACK_BYTES // each))


def gpu_peak(
    header: ModelHeader,
    tokens: int,
    width: int,
    *,
    batch: int,
    in_turn_bytes: int,
    gram: bool,
    bits: int | None,
    by_group: bool,
    in_parts: bool,
    gpus: int = 1,
) -> int:
    """Return the peak in bytes of one of so many GPUs, each of which holds a part of a mixture's experts.

    tokens: of the calibration text on this GPU. width: of the hidden states. batch: tokens of a batch. in_turn_bytes: limit of the intermediate results
    of all texts inside a block. gram: whether Σ xxᵀ is summed. bits: of the codes in the result; None: pruned weights. by_group: as
    `Method.by_group`; False: AWQ's estimate. in_parts: whether a block is settled part by part.
    """
    prefix, whole, itemsize = _largest_block(header)
    if not whole:
        return _WORKSPACE
    gpus = gpus if gpus <= header.experts else 1
    _, groups, _ = _largest_block(header, gpus)
    parameters = sum(
        math.prod(tensor.shape)
        for tensor in header.tensors
        if tensor.name.startswith(prefix) and _is_first_gpus(tensor.name, gpus)
    )
    linear = sum(group.weights for group in groups)
    of_others = (
        sum(group.weights for group in whole) - linear
    )  #: whose results the first GPU holds until they are written
    batch = min(batch, tokens)
    inner = max(groups, key=lambda group: group.columns)
    block = itemsize * parameters
    written = 1.0 * itemsize if bits is None else bits / 8
    floats = _FLOAT if bits is not None else 0  #: bytes per weight that is dequantized from codes
    earlier = int(written * (linear + of_others))  #: bytes of the previous block's result, until it is written
    mixture = header.has_experts
    waits = itemsize * tokens * (4 * width + 2 * inner.columns)
    in_turn = by_group and not mixture and header.model_type not in SHARED_BLOCKS and waits <= in_turn_bytes
    hidden = itemsize * tokens * width
    grams = sum(_FLOAT * group.columns**2 for group in groups) if gram else 0
    if gpus > 1:  # an expert gets the tokens of all GPUs
        groups = [group._replace(share=gpus * group.share if group.share < 1 else 1.0) for group in groups]
        inner = max(groups, key=lambda group: group.columns)
    product = itemsize * batch * int(inner.columns * inner.share)
    entered = itemsize * batch * (width + sum(int(group.columns * group.share) for group in groups))
    if gpus > 1:  # tokens and answers that travel at once, as they leave and as they arrive
        travelling = max(EXCHANGED_TOKENS, int(batch * gpus * header.expert_share))
        entered += 4 * itemsize * width * travelling
    if bits is None and not gram:
        entered += _SQUARES * batch * inner.columns
    else:
        entered += 2 * product  # gate and up projection, while they are multiplied
    stages = [hidden + itemsize * _largest_outside(header) + 2 * itemsize * batch * width]
    weight_copies = (_ROUNDING if bits is not None else _PRUNING) * gram
    for group in groups if by_group and not in_parts else ():
        others = linear - group.weights
        held = earlier + int((floats + written) * others) + itemsize * group.weights
        own = _FLOAT * group.columns**2
        settling = _settling(group, stack_size(group.rows, group.columns, groups.count(group)), gram, weight_copies)
        if in_turn:
            waiting = itemsize * tokens * (group.columns + width)
            stages.append(waiting + block + own * gram + held + settling)
            stages.append(waiting + block + own * gram + held + 2 * product)
        else:
            stages.append(hidden + block + grams + held + settling)
    kept = 0.0 if bits is None else written  #: pruned weights are in their layers, and are written from there
    if in_parts:
        left, done = grams, 0.0
        for group, stacked in _parts(groups):
            held = earlier + int(done) + itemsize * group.weights
            stages.append(hidden + block + left + held + _settling(group, stacked, gram, weight_copies))
            left -= _FLOAT * group.columns**2 * stacked * gram
            done += kept * group.weights * stacked
    if not in_turn:
        stages.append(hidden + block + grams + earlier + entered)
        again = 3 * product + 2 * itemsize * batch * width
        brought = int(written * of_others)
        results = kept if in_parts else floats + written
        stages.append(hidden + block + int(results * linear) + brought + again)
    if not by_group:
        held = hidden + block + grams + earlier + _FLOAT * linear
        stages.append(held + _FLOAT * linear)  # the proof that factors may be exchanged: two copies in float32
        stages += [held + searched for searched in _searched(groups, mixture, on_gpu=True)]
    return max(stages) + _WORKSPACE


def _settling(group: _Group, stacked: int, gram: bool, copies: int) -> int:
    """Return the bytes while so many such groups are settled side by side, beside statistics and results. copies: bytes per weight."""
    own = _FLOAT * group.columns**2 * gram
    own_grams = own * stacked if stacked > 1 else 0
    factors = 3 * own  # rotated by 180°, factorized, rotated back
    return stacked * max(factors, copies * group.weights + own) + own_grams


def _parts(groups: list[_Group]) -> Iterator[tuple[_Group, int]]:
    """Yield the parts in which a mixture's groups are settled: a group, and how many of its shape are in the part."""
    for group, count in Counter(sorted(groups, key=lambda group: group.share < 1)).items():
        most = stack_size(group.rows, group.columns, count)
        for start in range(0, count, most):
            yield group, min(most, count - start)


def learning_peak(header: ModelHeader, tokens: int, width: int, *, batch: int, queue: Queue) -> int:
    """Return the peak in bytes while a block learns its codes. Other arguments as in `gpu_peak`.

    A GPU computes in the stored number type. A processor may have to compute in float32, so that is assumed.
    """
    prefix, groups, stored = _largest_block(header)
    itemsize = stored if queue == "gpu" else _FLOAT
    if not groups:
        return _WORKSPACE
    parameters = sum(math.prod(tensor.shape) for tensor in header.tensors if tensor.name.startswith(prefix))
    linear = sum(group.weights for group in groups)
    largest = max(math.prod(tensor.shape) for tensor in header.tensors if tensor.name.startswith(prefix))
    batch = min(batch, tokens)
    hidden = 2 * itemsize * tokens * width  # in the source model, and in the settled one
    grams = sum(_FLOAT * group.columns**2 for group in groups)
    block = itemsize * parameters
    learned = linear * (_LEARNED + 3 * itemsize) + _LEARNED_COPIES[queue] * largest
    kept = batch * sum(int(group.columns * group.share) for group in groups) * (2 * itemsize + _FLOAT)
    kept += batch * width * _KEPT_WIDTHS * _FLOAT
    return hidden + grams + block + learned + kept + _WORKSPACE


def searched_bytes(header: ModelHeader) -> int:
    """Return the bytes that AWQ's search holds beside a block and its inputs' Gram matrices, on any device."""
    _, groups, _ = _largest_block(header)
    return max(_searched(groups, header.has_experts, on_gpu=False), default=0)


def _searched(groups: list[_Group], mixture: bool, *, on_gpu: bool) -> list[int]:
    """Return the bytes that AWQ's search holds in each place. In a mixture, all experts are behind the same norm.

    A GPU searches groups of equal shape side by side, and stacks their Gram matrices.
    """
    found = []
    for group in groups:
        count = stack_size(group.rows, group.columns, groups.count(group)) if on_gpu else 1
        copies = _FLOAT * group.weights + _SEARCHED_COPIES * min(group.rows, _SEARCHED_ROWS) * group.columns
        found.append(count * copies + (_FLOAT * count * group.columns**2 if count > 1 else 0))
    behind: dict[int, tuple[int, int]] = {}
    for group in groups if mixture else ():
        weights, grams = behind.get(group.columns, (0, 0))
        behind[group.columns] = weights + group.weights, grams + _FLOAT * group.columns**2
    return found + [
        _FLOAT * weights + (min(grams, _STACK_BYTES // 4) if on_gpu else 0) for weights, grams in behind.values()
    ]


def _is_first_gpus(name: str, gpus: int) -> bool:
    """Whether the first of so many GPUs holds a tensor. Of a mixture's experts each GPU holds every n-th."""
    found = _EXPERT.search(name)
    return found is None or int(found[1]) % gpus == 0


def _largest_block(header: ModelHeader, gpus: int = 1) -> tuple[str, list[_Group], int]:
    """Return for the block with the most parameters: the prefix of its tensors' names, its groups, and the bytes of a number.

    gpus: number of GPUs that share out the experts. The groups are those of the first.
    """
    sizes: dict[str, int] = {}
    for tensor in header.tensors:
        if (found := re.match(r".*?\.\d+\.", tensor.name)) is not None:
            sizes[found[0]] = sizes.get(found[0], 0) + math.prod(tensor.shape)
    if not sizes:
        return "", [], 2
    prefix = max(sizes, key=lambda name: sizes[name])
    reached = header.expert_share
    groups: dict[str, _Group] = {}
    itemsize = 2
    for tensor in header.tensors:
        if not tensor.name.startswith(prefix) or len(tensor.shape) != 2 or not _is_first_gpus(tensor.name, gpus):
            continue
        if tensor.dtype == "F32":
            itemsize = 4
        rows, columns = reversed(tensor.shape) if header.model_type in CONV1D else tensor.shape
        share = reached if is_expert(tensor.name) else 1.0
        name = input_of(tensor.name)
        known = groups.get(name, _Group(columns, 0, 0, share))
        groups[name] = _Group(columns, known.weights + rows * columns, known.rows + rows, share)
    return prefix, list(groups.values()), itemsize


def _largest_outside(header: ModelHeader) -> int:
    inside = re.compile(r".*?\.\d+\.")
    return max((math.prod(tensor.shape) for tensor in header.tensors if not inside.match(tensor.name)), default=0)


def input_of(name: str) -> str:
    """Return a name of the layer's input: layers with the same name read the same inputs, e.g. query, key and value, or gate and up."""
    holder, _, leaf = name.removesuffix(".weight").rpartition(".")
    if re.fullmatch(r"[qkv](_proj|_lin)?|query|key|value|gate_proj|up_proj|w1|w3|wi_\d", leaf):
        return holder
    return name
