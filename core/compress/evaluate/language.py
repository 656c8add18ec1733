"""Metrics of language models: perplexity, hidden words, multiple choice, and whether an artifact generates the same text as its source."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nightpress.core.compress.data import tokenized
from nightpress.core.compress.data.chat import render_conversations
from nightpress.core.compress.data.rows import Row
from nightpress.core.compress.data.slices import Slices, by_slice, evenly, shares, slices_of
from nightpress.core.compress.data.tokenized import Ids, Sequences
from nightpress.core.compress.evaluate import fidelity
from nightpress.core.compress.evaluate.statistics import Array, Statistic, of_sums, paired_shares, ratio
from nightpress.core.compress.evaluate.view import OfExamples, OutputPair, ScorerRequest, sums
from nightpress.core.compress.export.task import TokenSet
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Measurement
from nightpress.core.recipes.datafile import tools_of

_PROMPTS = ("prompt", "text")


@dataclass(frozen=True)
class Perplexity(OfExamples):
    """Windows of running text; each token is scored at most once.

    sizes [N]: UTF-8 bytes of each window's scored tokens; None: the tokenizer does not know them.
    """

    sizes: Array | None

    def figures(self, view: OutputPair) -> list[Measurement]:
        targets = self.examples.sequences.targets
        assert targets is not None
        row, count = np.nonzero(targets >= 0)[0], len(targets)
        tokens = np.bincount(row, minlength=count).astype(np.float64)

        def perplexity(side: Any) -> Statistic:
            table = np.stack([sums(row, side("nll"), count), tokens], axis=1)
            return of_sums(table, lambda drawn: np.exp(drawn[:, 0] / np.maximum(drawn[:, 1], 1)))

        def bits(side: Any) -> Statistic:
            return ratio(sums(row, side("nll"), count) / np.log(2), self.sizes)

        found = [view.figure("perplexity", perplexity, count, n=len(row), better="lower", unit="per token")]
        if self.sizes is not None:
            found.append(
                view.figure("bits_per_byte", bits, count, n=int(self.sizes.sum()), better="lower", unit="bits")
            )
        return found + (fidelity.of_next_tokens(view, self.examples) if view.compares else [])

    def take(self, units: NDArray[np.bool_]) -> Self:
        return replace(super().take(units), sizes=None if self.sizes is None else self.sizes[units])


def perplexity(request: ScorerRequest) -> Perplexity:
    """Make windows that each start `stride` tokens after the one before. The last `stride` tokens are scored; those before are context.

    The first window is scored as a whole. Raises NightpressError(invalid_data) for fewer than two windows.
    """
    before, _ = tokenized.special_tokens(request.tokenizer)
    body = request.wanted.length - len(before)
    stride = min(request.wanted.stride or body, body)
    if body < 2:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"evaluate: a length of {request.wanted.length} leaves no room for text.",
            hint="Use at least 16 tokens.",
        )
    needed = request.wanted.samples * stride + body
    streams = {name: _stream(request, rows, needed) for name, rows in by_slice(request.source.rows()).items()}
    counts = [max(0, 1 + (len(ids) - body) // stride) for ids, _ in streams.values()]
    if sum(counts) < 2:
        raise request.invalid(
            f"its {sum(len(ids) for ids, _ in streams.values())} tokens fill fewer than two windows of {request.wanted.length}",
            "Bring more text, or ask for a shorter `length`.",
        )
    parts = []
    for stream, count, share in zip(streams.values(), counts, shares(counts, request.wanted.samples), strict=True):
        parts.append(_windows(*stream, evenly(count, share), body, stride, before))
    ids, targets = (np.concatenate(arrays) for arrays in zip(*((part[0], part[1]) for part in parts), strict=True))
    names = (name for name, part in zip(streams, parts, strict=True) for _ in part[0])
    windows = Sequences(ids, np.ones_like(ids), targets=targets, slices=slices_of(names))
    sizes = [part[2] for part in parts if part[2] is not None]
    known = np.concatenate(sizes) if len(sizes) == len(parts) else None
    return Perplexity(fidelity.token_set(request.name, windows, request.vocabulary), known)


def _windows(
    stream: Ids, sizes: Ids | None, chosen: Ids, body: int, stride: int, before: list[int]
) -> tuple[Ids, Ids, Array | None]:
    """Windows of a stream of tokens: ids and targets, [N, S] each, and the bytes of each window's scored tokens, [N].

    chosen [N]: numbers of the windows. before: tokens that precede each of them.
    """
    at = chosen[:, None] * stride + np.arange(body)  # [N, body], indices in the stream
    scored = (np.arange(body) >= body - stride) | (chosen[:, None] == 0)
    if not before:
        scored = scored & (np.arange(body) > 0)  # no token precedes a window's first token, so nothing predicts it
    ids = np.concatenate([np.tile(np.asarray(before, np.int64), (len(at), 1)), stream[at]], axis=1)
    targets = np.full_like(ids, -1)
    shift = len(before) - 1  # a token is scored at the position before it, which predicts it
    rows, columns = np.nonzero(scored)
    targets[rows, columns + shift] = stream[at][rows, columns]
    return ids, targets, None if sizes is None else np.where(scored, sizes[at], 0).sum(axis=1).astype(np.float64)


def _stream(request: ScorerRequest, rows: Sequence[Row], needed: int) -> tuple[Ids, Ids | None]:
    """Rows as one stream of tokens, and the UTF-8 bytes of each token (None if unknown). It ends after `needed` tokens."""
    ids: list[int] = []
    sizes: list[int] | None = []
    for row in rows:
        tokens, lengths = request.tokenizer.encode_counted(row.text + "\n")
        ids += tokens
        sizes = None if sizes is None or lengths is None else sizes + lengths
        if len(ids) >= needed:
            break
    return np.asarray(ids, np.int64), None if sizes is None else np.asarray(sizes, np.int64)


@dataclass(frozen=True)
class MaskedLm(OfExamples):
    """Texts with some tokens hidden. The model is scored on predicting them."""

    def figures(self, view: OutputPair) -> list[Measurement]:
        targets = self.examples.sequences.targets
        assert targets is not None
        row, count = np.nonzero(targets >= 0)[0], len(targets)
        tokens, truth = np.bincount(row, minlength=count), targets[targets >= 0]

        def right(side: Any) -> Statistic:
            return ratio(sums(row, side("top1") == truth, count), tokens)

        found = [view.figure("masked_accuracy", right, count, n=len(row), better="higher")]
        return found + (fidelity.of_tokens(view, self.examples) if view.compares else [])


def masked_lm(request: ScorerRequest) -> MaskedLm:
    """Hide 15% of the tokens of running text, as in BERT's training (arXiv 1810.04805, 3.1), but always behind the mask token.

    Raises NightpressError(invalid_data) if the tokenizer has no mask token.
    """
    examples = fidelity.prepare(request).examples
    if request.tokenizer.mask_id is None:
        raise request.invalid("the model's tokenizer has no mask token", "Measure `fidelity`.")
    return MaskedLm(examples)


@dataclass(frozen=True)
class Choices:
    """Multiple-choice questions. The model's choice is the answer with the largest likelihood per byte."""

    examples: TokenSet
    group: NDArray[np.int64]  #: [N], index of each sequence's question
    sizes: Array  #: [N], bytes of each answer
    answers: NDArray[np.int64]  #: [Q], index of the sequence with the correct answer
    slices: Slices | None = None  #: of each question
    asked: NDArray[np.bool_] | None = None  #: [Q], the questions that count; None: all

    def figures(self, view: OutputPair) -> list[Measurement]:
        targets = self.examples.sequences.targets
        assert targets is not None
        row, count = np.nonzero(targets >= 0)[0], len(targets)
        asked = np.ones(len(self.answers), bool) if self.asked is None else self.asked

        def chosen(side: Any) -> NDArray[np.int64]:
            loss = sums(row, side("nll"), count) / self.sizes
            order = np.lexsort((np.arange(count), np.round(loss, 9), self.group))  # ties: the first answer wins
            best = order[np.searchsorted(self.group[order], np.arange(len(self.answers)))]
            return best[asked].astype(np.int64)

        ours, theirs = chosen(view.ours), chosen(view.theirs)
        found = fidelity.of_answers(view, "choice_accuracy", ours, theirs, self.answers[asked])
        return found + ([fidelity.of_flips(view, ours, theirs)] if view.compares else [])

    def part(self, view: OutputPair, units: NDArray[np.bool_]) -> list[Measurement]:
        return replace(self, asked=units).figures(view)


def choices(request: ScorerRequest) -> Choices:
    """Read rows with `prompt`, `choices` and `answer`, the index of the correct choice. Scored like `acc_norm` of lm-evaluation-harness.

    Raises NightpressError(invalid_data).
    """
    records, source = request.source.records(), request.source
    before, _ = tokenized.special_tokens(request.tokenizer)
    encoded: list[list[int]] = []
    starts, group, sizes, answers = [], [], [], []
    slices = source.slices(records)
    drawn = request.drawn(slices)
    for question, at in enumerate(drawn):
        row = records[at]
        prompt = source.field(row, at, "text", "prompt", "question")
        options = source.field(row, at, "texts", "choices")
        answer = source.field(row, at, "number", "answer", "label")
        if len(options) < 2 or answer not in range(len(options)):
            raise request.invalid(
                f"row {at + 1} has {len(options)} choices and the answer {answer!r}", "Count the answer from 0."
            )
        answers.append(len(encoded) + int(answer))
        for option in options:
            stem = request.tokenizer.encode(prompt, special=False)
            whole = request.tokenizer.encode(f"{prompt} {option}", special=False)
            # The prompt is the common start of both. At its end, the tokenizer may merge prompt and answer into one token.
            shared = next((i for i, (a, b) in enumerate(zip(stem, whole, strict=False)) if a != b), len(stem))
            ids = [*before, *whole]
            if len(ids) > request.wanted.length:
                raise request.invalid(
                    f"row {at + 1} has {len(ids)} tokens, more than the {request.wanted.length} of `length`",
                    "Raise `length`, or shorten the row.",
                )
            encoded.append(ids)
            starts.append(max(len(before) + min(shared, len(whole) - 1), 1))
            group.append(question)
            sizes.append(len(option.encode()))
    padded = tokenized.pad(encoded, request.tokenizer.pad_id)
    targets = np.full_like(padded.ids, -1)
    for at, (ids, start) in enumerate(zip(encoded, starts, strict=True)):
        targets[at, start - 1 : len(ids) - 1] = ids[start:]
    sequences = Sequences(padded.ids, padded.mask, targets=targets)
    examples = TokenSet(request.name, "tokens", sequences, compared=np.zeros(targets.shape, bool))
    return Choices(
        examples,
        np.asarray(group),
        np.asarray(sizes, np.float64),
        np.asarray(answers),
        slices_of(slices[at] for at in drawn),
    )


@dataclass(frozen=True)
class Generation(OfExamples):
    """Prompts that the source continues greedily. An artifact then reads prompt and continuation in one forward pass.

    Up to the first token where its choice differs, the artifact's greedy continuation is the same as the source's. So one forward pass
    shows how long both agree. It works in every consumer, and a rounded cache has no influence.
    """

    def figures(self, view: OutputPair) -> list[Measurement]:
        if not view.compares:
            return []
        written, chosen = view.theirs("tokens"), view.ours("tokens")  # [N, new], −1 after the end
        lengths = (written >= 0).sum(axis=1)
        differs = (written != chosen) & (written >= 0)
        prefix = np.where(differs.any(axis=1), differs.argmax(axis=1), lengths).astype(np.float64)
        whole, n = (prefix == lengths).astype(np.float64), len(written)
        same = paired_shares(whole, np.ones_like(whole), seed=view.seed).figure
        return [
            view.alone("generation_match", same, n=n, better="higher"),
            view.resampled("prefix_match", ratio(prefix, lengths), n, n=int(lengths.sum()), better="higher"),
        ]


def generation(request: ScorerRequest) -> Generation:
    """Read rows with `prompt` (or `text`), cut at `length` tokens, or with `messages`. For built-in prose, windows of it are the prompts."""
    wanted = request.wanted
    before, after = tokenized.special_tokens(request.tokenizer)
    if request.header.task != "seq2seq":  # an encoder reads a whole text, to its end
        after = []
    if request.ref.startswith("builtin:"):
        prompts = tokenized.text_windows(
            request.source.rows(), request.tokenizer, samples=wanted.samples, length=wanted.length, ref=request.ref
        )
    else:
        records, source = request.source.records(), request.source
        slices = source.slices(records)
        drawn = request.drawn(slices)
        encoded = _encoded_prompts(request, {int(at): records[at] for at in drawn}, before, after)
        prompts = replace(
            tokenized.pad(encoded, request.tokenizer.pad_id), slices=slices_of(slices[at] for at in drawn)
        )
    if request.prefix:
        first: NDArray[Any] = np.tile(np.asarray(request.prefix, np.int64), (len(prompts.ids), 1))
        prompts = replace(prompts, decoder=first)
    return Generation(TokenSet(request.name, "generated", prompts, new_tokens=wanted.new_tokens))


def _encoded_prompts(
    request: ScorerRequest, records: dict[int, dict[str, Any]], before: list[int], after: list[int]
) -> list[list[int]]:
    """The tokens of each prompt. records: index of a row → its columns.

    A conversation is rendered up to its last answer, which the model is to write. One that is too long loses its beginning.
    """
    source, length = request.source, request.wanted.length
    asked = {at: _questions(row["messages"]) for at, row in records.items() if row.get("messages")}
    rendered: dict[int, str] = {}
    if asked:
        if source.model_dir is None:
            raise request.invalid("it holds conversations, which are not read here", "Bring rows with a `prompt`.")
        tools = [tools_of(request.ref, f"row {at + 1}", records[at].get("tools")) for at in asked]
        texts = render_conversations(
            list(asked.values()), source.model_dir, ref=request.ref, answering=True, tools=tools
        )
        rendered = dict(zip(asked, texts, strict=True))
    encoded = []
    for at, row in records.items():
        if at in rendered:
            ids = request.tokenizer.encode(rendered[at], special=False)
            encoded.append((ids if ids[: len(before)] == before else [*before, *ids])[-length:])
        else:
            ids = request.tokenizer.encode(source.field(row, at, "text", *_PROMPTS), special=False)
            whole = [*before, *ids, *after]
            encoded.append(tokenized.cut(whole, length) if after else whole[:length])
    return encoded


def _questions(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation without the answers at its end."""
    end = len(messages)
    while end > 1 and messages[end - 1].get("role") == "assistant":
        end -= 1
    return [{**turn, "content": turn.get("content") or ""} for turn in messages[:end]]
