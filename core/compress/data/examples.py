"""Training examples: texts as token ids, with labels if there are any, and batches of them in an order that depends on the seed alone."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.compress.data.pairs import has_pairs, pair_rows
from nightpress.core.compress.data.rows import read_rows
from nightpress.core.compress.data.tokenized import (
    DataSource,
    check_vocabulary,
    class_index,
    encode_row,
    open_tokenizer,
    text_windows,
)
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.header import ModelHeader

_POOL = 32  #: batches in a pool. Texts of a pool are sorted by length, so that little is computed on padding.
_FEWEST = 4  #: examples that a training needs at least
UNLABELLED = -100  #: label of an example without one, as torch's losses ignore it
_ALL = 10**7  #: windows: more than any data set has that is read whole


@dataclass(frozen=True)
class Examples:
    """Texts of different lengths as token ids."""

    ids: tuple[NDArray[np.int64], ...]
    labels: NDArray[np.int64] | None  #: [N], or UNLABELLED; None: no example has one
    pad_id: int
    numbers: NDArray[np.int64]  #: [N], index of each example in the whole data set
    types: tuple[NDArray[np.int64], ...] | None = (
        None  #: of each token, if the examples are pairs whose model reads types
    )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: NDArray[np.int64]) -> "Examples":
        labels = None if self.labels is None else self.labels[chosen]
        types = None if self.types is None else tuple(self.types[at] for at in chosen)
        return Examples(tuple(self.ids[at] for at in chosen), labels, self.pad_id, self.numbers[chosen], types)

    def split(self, share: float, *, seed: int) -> "tuple[Examples, Examples | None]":
        """Split into (training examples, validation examples) at random by the seed. The second is None if `share` gives no example.

        share: fraction of the examples that go into the validation set.
        """
        held = round(share * len(self))
        if not share or held == 0:
            return self, None
        order = np.random.default_rng((seed, 0x5EED)).permutation(len(self))
        return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))

    def batches(self, batch: int) -> int:
        """The number of batches in an epoch, at least 1. An epoch leaves out the examples that do not fill a whole batch."""
        return max(1, len(self) // batch)

    def digest(self) -> bytes:
        found = hashlib.sha256()
        for row in (*self.ids, *(self.types or ())):
            found.update(len(row).to_bytes(4, "little") + row.tobytes())
        if self.labels is not None:
            found.update(self.labels.tobytes())
        return found.digest()


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right: a whole batch, or the part of it that one of several processes computes."""

    ids: Tensor  #: int64 [B, S]
    mask: Tensor  #: int64 [B, S]
    labels: Tensor | None  #: int64 [B]
    numbers: Tensor  #: int64 [B] on the CPU, index of each example in the whole data set
    types: Tensor | None  #: int64 [B, S], of pairs whose model reads types
    whole: int  #: examples in the whole batch
    first: int  #: index of the first example in the whole batch
    seed: int  #: of the whole batch's random numbers
    #: False: this process has no part of the batch. It computes an example of another one, which counts nothing.
    counts: bool = True

    @property
    def share(self) -> float:
        """This part's share of the whole batch's examples."""
        return len(self.ids) / self.whole if self.counts else 0.0

    def uniform(self) -> Tensor:
        """Random numbers in [0, 1) for each token, float32 [B, S]. An example gets the same ones in a whole batch and in a part."""
        device = self.ids.device
        generator = torch.Generator(device).manual_seed(self.seed)
        drawn = torch.rand(self.whole, self.ids.shape[1], generator=generator, device=device)
        return drawn[self.first : self.first + len(self.ids)]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The model's arguments."""
        found = {"input_ids": self.ids, "attention_mask": self.mask}
        return found if self.types is None else found | {"token_type_ids": self.types}


def read_examples(
    folder: Path, header: ModelHeader, ref: str, file: Path | None, *, length: int, labelled: bool
) -> Examples:
    """Read all examples of a data set with the tokenizer of the model in `folder`, each of at most `length` tokens.

    For classifiers and embedders, each row of a data set is an example. Running text, and all text for other models, is cut into windows.
    Raises NightpressError(invalid_data) if `labelled` and a row has no label, or if a label is not one of the model's classes.
    """
    data = DataSource(ref, file, folder, purpose="calibration")
    paired = header.task == "classification" and (has_pairs(data) or (header.scores_pairs and file is None))
    rows = pair_rows(data) if paired else read_rows(ref, file, purpose="calibration")
    tokenizer = open_tokenizer(folder)
    if labelled and header.task == "classification" and header.head != "classes":
        raise _unusable(
            ref,
            f"the model's outputs are {header.head}, and only labels of models that choose one class are learned from",
            "Learn from the model's answers alone (`alpha: 1`).",
        )
    whole_rows = header.task in {"classification", "embedding"} and file is not None
    by_row = paired or whole_rows or any(row.label is not None for row in rows)
    if labelled and not all(row.label is not None for row in rows):
        raise _unusable(
            ref,
            "not all of its rows have a `label`",
            "Give every row one, or learn from the model's answers alone (`alpha: 1`).",
        )
    types: list[list[int]] = []
    if by_row and header.task in {"classification", "embedding"}:
        encoded = [encode_row(row, tokenizer, length) for row in rows]
        ids, types = [row for row, _ in encoded], [kinds for _, kinds in encoded]
    else:
        windows = text_windows(rows, tokenizer, samples=_ALL, length=length, ref=ref)
        check_vocabulary(windows, header)
        ids = [row.tolist() for row in windows.ids]
    choosing = header.task == "classification" and header.head == "classes"
    known = by_row and choosing and all(row.label is not None for row in rows)
    labels = [class_index(row.label, header, ref) for row in rows] if known else None
    if len(ids) < _FEWEST:
        raise _unusable(ref, f"its {len(ids)} examples are too few to learn from", "Bring more text.")
    return Examples(
        ids=tuple(np.asarray(row, np.int64) for row in ids),
        labels=None if labels is None else np.asarray(labels, np.int64),
        pad_id=tokenizer.pad_id,
        numbers=np.arange(len(ids)),
        types=tuple(np.asarray(row, np.int64) for row in types) if paired and header.reads_types else None,
    )


def batch_order(examples: Examples, batch: int, *, seed: int, epoch: int) -> list[NDArray[np.int64]]:
    """The batches of an epoch as arrays of indices. Seed and epoch decide the order; texts of similar length share a batch.

    Each example occurs at most once.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(examples))
    lengths = np.asarray([len(row) for row in examples.ids])
    pool = batch * _POOL
    pooled = [order[start : start + pool] for start in range(0, len(order), pool)]
    by_length = np.concatenate([indices[np.argsort(lengths[indices], kind="stable")] for indices in pooled])
    count = examples.batches(batch)
    batches = [by_length[at * batch : (at + 1) * batch] for at in range(count)]
    return [batches[at] for at in random.permutation(count)]


def collate(
    examples: Examples, chosen: NDArray[np.int64], device: torch.device, *, seed: int = 0, part: slice | None = None
) -> Batch:
    """Make a batch of these examples on the device, padded to the longest of them.

    seed: of the batch's random numbers. part: the examples of this process, padded as the whole batch is; None: all. It may be empty.
    """
    width, whole = max(len(examples.ids[at]) for at in chosen), len(chosen)
    own = range(whole)[part or slice(None)]
    first = own.start if own else 0
    chosen = chosen[first : first + max(1, len(own))]
    all_inputs = np.zeros((3, len(chosen), width), np.int64)  # ids, mask and types, for one transfer
    all_inputs[0] = examples.pad_id
    for row, at in enumerate(chosen):
        all_inputs[0, row, : len(examples.ids[at])] = examples.ids[at]
        all_inputs[1, row, : len(examples.ids[at])] = 1
        if examples.types is not None:
            all_inputs[2, row, : len(examples.ids[at])] = examples.types[at]

    def put(array: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    labels = None if examples.labels is None else put(examples.labels[chosen])
    ids, mask, types = put(all_inputs)
    numbers = torch.from_numpy(examples.numbers[chosen])
    kinds = None if examples.types is None else types
    return Batch(ids, mask, labels, numbers, kinds, whole, first, seed, counts=len(own) > 0)


def _unusable(ref: str, what: str, hint: str) -> NightpressError:
    return NightpressError(
        ErrorCode.INVALID_DATA, f"The data set {ref} can't be learned from: {what}.", hint=hint, data=ref
    )
