"""Distillation: a student learns from a frozen teacher, and a pruned model learns from the model before pruning."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext, over_ranks
from nightpress.core.compress.data.alterations import Alterations
from nightpress.core.compress.data.examples import UNLABELLED, Batch, read_examples
from nightpress.core.compress.data.tokenized import open_tokenizer, special_tokens
from nightpress.core.compress.executors.holding import hold_frozen
from nightpress.core.compress.executors.objective import Aside, Objective
from nightpress.core.compress.executors.train import Renewal, TrainingResult, frozen_model, precision, train
from nightpress.core.compress.model.kept_zeros import KeptZeros
from nightpress.core.compress.model.networks import (
    cast_weights,
    embeddings_of,
    find_blocks,
    grow_student,
    load_model,
    save_model,
)
from nightpress.core.compress.passes.low_rank import add_low_rank, merge_low_rank
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.teacher_cache import CachedLogits, cache_logits
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.distillation import (
    cosine_distance,
    hidden_error,
    label_error,
    mean_square,
    number_error,
    pool,
    relation_divergence,
    soft_cross_entropy,
    with_the_rest,
)
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.depth import ends_of_spans
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.passes.distill import Distill, Recover, Teaching

_PROJECTIONS = ({"query", "q_proj", "q_lin", "q", "query_proj"}, {"key", "k_proj", "k_lin", "k", "key_proj"}, {"value", "v_proj", "v_lin", "v", "value_proj"})  # fmt: skip
_MASKED = 0.15  #: share of the tokens that are masked for a masked language model


@folder_pass(Distill)
def distill(source: Path, target: Path, options: Distill, context: PassContext) -> PassRecord:
    """Train a student on the source's outputs. `target` becomes the student's folder."""
    return in_processes(_distill, source, target, options, context)


def _distill(source: Path, target: Path, options: Distill, *, context: PassContext) -> PassRecord:
    start = time.monotonic()
    teacher = load_model(source, context.header)
    layer_map = options.student.layer_map(context.header)
    student = grow_student(teacher, options.student.changes(context.header), layer_map, seed=context.seed)
    taken = _taken_embeddings(student, teacher) if options.train.freeze_embeddings else []
    trained, extra = teach(student, teacher, taken, source, options, context)
    if context.group.first:
        save_model(student, source, target, context.header)
    return record_of(options, context, student, teacher, trained, start, {"layer_map": list(layer_map), **extra})


@folder_pass(Recover)
def recover(source: Path, target: Path, options: Recover, context: PassContext) -> PassRecord:
    """Train the pruned model in `source` with the job's source model as the teacher. Weights that are exactly zero stay zero."""
    return in_processes(_recover, source, target, options, context)


def _recover(source: Path, target: Path, options: Recover, *, context: PassContext) -> PassRecord:
    start = time.monotonic()
    origin = context.origin or source
    teacher = load_model(origin, inspect_model(FolderFiles(origin)))
    student = load_model(source, context.header)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise NightpressError(
            ErrorCode.INVALID_RECIPE,
            f"`recover`: the pruned model reads {student.config.vocab_size} tokens, its source {teacher.config.vocab_size}.",
            hint="Take out the pass that changed the vocabulary.",
        )
    masks = KeptZeros(student)
    merged = add_low_rank(student, options.lora, seed=context.seed) if options.lora else None
    frozen = embeddings_of(student) if options.train.freeze_embeddings else []
    trained, extra = teach(student, teacher, frozen, source, options, context, masks=None if merged else masks)
    if merged is not None:
        merge_low_rank(student, merged)
    masks.apply()
    if context.group.first:
        save_model(student, source, target, context.header)
    return record_of(options, context, student, teacher, trained, start, extra)


def in_processes(
    function: Callable[..., PassRecord], source: Path, target: Path, options: Teaching, context: PassContext
) -> PassRecord:
    """Call function(source, target, options, context=…) in all processes that share out the training's batches. Only the first writes."""
    work = (source, target, options)
    return cast("PassRecord", over_ranks(function, *work, samples=options.train.batch, context=context))


def teach(
    student: Any,
    teacher: Any,
    frozen: list[nn.Parameter],
    source: Path,
    options: Teaching,
    context: PassContext,
    masks: KeptZeros | None = None,
    *,
    measured: bool = False,
) -> tuple[TrainingResult, dict[str, Any]]:
    """Train the student on the teacher's outputs with the losses of the options. Afterwards the student is on the CPU.

    frozen: parameters that don't learn. measured: the loss on the validation examples is also taken before the training, as `loss_before`.
    Returns the training's result and more fields for the record's summary.
    """
    header = context.header
    torch.set_num_threads(context.threads)
    options = options.resolved(header)
    context.progress(0.0, "reading the examples")
    examples = read_examples(
        source,
        header,
        options.train.data,
        context.data_files.get(options.train.data),
        length=options.train.length,
        labelled=options.wants_labels(header),
    )
    for parameter in frozen:
        parameter.requires_grad_(False)
    device = torch.device(context.device)
    cast_weights(teacher, precision(options.train, context.device)).requires_grad_(False).eval()
    cached_only = options.logits is not None and options.logits.cache  # then processes ask it for texts of their own
    hold_frozen(teacher, ALONE if cached_only else context.group, device)
    if options.train.gradient_checkpointing:
        student.activation_checkpointing_enable()
    cached = None
    if cached_only:
        inputs = _Inputs(source, header, fixed=True)
        cached = cache_logits(teacher, inputs.of, examples, options, context, span=(0.0, 0.2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        lesson = StudentTraining(student, teacher, options, source, header, cached, context.group)
    trained = train(
        lesson,
        examples,
        options.train,
        context,
        recipe=f"{options.name} {options.model_dump_json()} {header.model_dump_json()}",
        span=(0.2 if cached else 0.0, 1.0),
        zeros={} if masks is None else masks.of(lesson),
        measured=measured,
        renewed=_alterations(source, options.altered, context.seed) if options.altered else None,
    )
    student.to("cpu")
    extra = {"examples": len(examples), "cached_logits": None if cached is None else cached.size}
    return trained, extra | ({"loss_before": trained.before["loss"]} if trained.before else {})


def _alterations(source: Path, share: float, seed: int) -> Renewal:
    tokenizer = open_tokenizer(source)
    before, after = special_tokens(tokenizer)
    alterations = Alterations(share, frozenset({*before, *after}), tokenizer.mask_id)
    return lambda examples, epoch: alterations.of(examples, seed=(seed, epoch))


class _Inputs:
    """Makes a model's inputs from a batch, and the mask of scored positions: the masked tokens of a masked language model, else all.

    fixed: a text always gets the same masked tokens, so that cached logits fit.
    """

    def __init__(self, folder: Path, header: ModelHeader, *, fixed: bool) -> None:
        self.task, self.fixed = header.task, fixed
        tokenizer = open_tokenizer(folder)
        before, after = special_tokens(tokenizer)
        self._special = torch.tensor(sorted({*before, *after}), dtype=torch.int64)
        self._mask_id = tokenizer.mask_id

    def of(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Return (the model's arguments, mask of scored positions, labels at these positions).

        The mask is bool [B, S] for logits [B, S, V], and None for a classifier's logits [B, C] and for an embedder.
        """
        read = batch.inputs
        if self.task == "classification":
            return read, None, batch.labels
        if self.task == "causal-lm":
            where = batch.mask.bool() & torch.cat([batch.mask[:, 1:], torch.zeros_like(batch.mask[:, :1])], 1).bool()
            return read, where, batch.ids.roll(-1, 1)[where]
        if self.task == "masked-lm":
            allowed = batch.mask.bool() & ~torch.isin(batch.ids, self._special.to(batch.ids.device))
            where = (self._draw(batch) < _MASKED) & allowed
            where[:, 1] |= ~where.any(1) & allowed[:, 1]
            if self._mask_id is not None:
                read["input_ids"] = batch.ids.masked_fill(where, self._mask_id)
            return read, where, batch.ids[where]
        return read, None, None

    def _draw(self, batch: Batch) -> Tensor:
        if not self.fixed:
            return batch.uniform()
        rows = []
        for number in batch.numbers.tolist():  # a text gets the same masked tokens in every batch
            generator = torch.Generator().manual_seed(number)
            rows.append(torch.rand(batch.ids.shape[1], generator=generator))
        return torch.stack(rows).to(batch.ids.device)


class StudentTraining(Objective):
    """The student and its projections learn. The frozen teacher computes the targets."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        options: Teaching,
        source: Path,
        header: ModelHeader,
        cached: CachedLogits | None,
        group: Group,
    ) -> None:
        """group: the processes that each compute a part of a batch."""
        super().__init__()
        self.student, self._teacher, self._group = student, Aside(teacher), group
        self._options, self._header, self._cached = options, header, cached
        self._inputs = _Inputs(source, header, fixed=cached is not None)
        self._pooling = header.pooling
        self.projections = nn.ModuleList()
        self._hidden_map: tuple[int, ...] = ()
        if options.hidden is not None:
            ours, theirs = _blocks(student), _blocks(teacher)
            self._hidden_map = options.hidden.layers or ends_of_spans(len(ours), len(theirs))
            widths = student.config.hidden_size, teacher.config.hidden_size
            self.projections = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in ours if widths[0] != widths[1])
        self._watched: tuple[nn.Module, ...] = ()
        self._taught = Aside[tuple[nn.Module, ...]](())
        if options.relations is not None:
            self._watched = _projections(_blocks(student)[-1])
            self._taught = Aside(_projections(_blocks(teacher)[options.relations.layer]))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        read, where, labels = self._inputs.of(batch)
        options = self._options
        more = {"output_hidden_states": True} if options.hidden is not None else {}
        with _watch(self._watched) as our_vectors:
            ours = self.student(**read, **more)
        theirs: Any = None
        with frozen_model(batch.ids.device), _watch(self._taught.held) as their_vectors:
            if self._cached is None:
                theirs = self._teacher.held(**read, **more)
        found: dict[str, Tensor] = {}
        parts: list[Tensor] = []  # weighted terms of the loss
        by_token = options.hidden is not None or options.relations is not None
        tokens = self._group.share_of(batch.mask.sum() * batch.counts) if by_token else 1.0  # this part's share of them
        alone = self._group.size == 1
        if options.logits is not None:
            logits = ours.logits if where is None else ours.logits[where]
            scored = batch.share if where is None else self._group.share_of(where.sum() * batch.counts)
            if not alone and not len(logits):  # this process's texts have no scored position
                found["logits"] = logits.sum()
            elif self._cached is None:
                answer = theirs.logits if where is None else theirs.logits[where]
                found["logits"] = self._distance(logits, answer, scored)
            else:
                values, indices = self._cached.of(batch, where)
                with_rest = values.shape[-1] > indices.shape[-1]
                temperature = options.logits.temperature
                ours_of_them = with_the_rest(logits, indices, temperature) if with_rest else logits.gather(-1, indices)
                found["logits"] = self._distance(ours_of_them, values, scored)
            found["logits"] = found["logits"] * scored
            parts.append(options.logits.weight * options.logits.alpha * found["logits"])
            if options.logits.alpha < 1:
                assert labels is not None
                labelled = self._group.share_of((labels != UNLABELLED).sum() * batch.counts)
                found["labels"] = label_error(logits, labels) * labelled
                parts.append(options.logits.weight * (1 - options.logits.alpha) * found["labels"])
        if options.hidden is not None:
            errors = []
            for at, origin in enumerate(self._hidden_map):
                state: Tensor = ours.hidden_states[at + 1]
                if len(self.projections):
                    state = self.projections[at](state)
                taught = theirs.hidden_states[origin + 1]
                size = None if alone else self._group.mean(mean_square(taught, batch.mask), tokens)
                errors.append(hidden_error(state, taught, batch.mask, size))
            found["hidden"] = torch.stack(errors).mean() * tokens
            parts.append(options.hidden.weight * found["hidden"])
        if options.relations is not None:
            pairs = zip(our_vectors, their_vectors, strict=True)
            kinds = [relation_divergence(a, b, batch.mask, options.relations.heads) for a, b in pairs]
            found["relations"] = torch.stack(kinds).mean() * tokens
            parts.append(options.relations.weight * found["relations"])
        if options.cosine is not None:
            mine, its = (pool(output.last_hidden_state, batch.mask, self._pooling) for output in (ours, theirs))
            found["cosine"] = cosine_distance(mine, its) * batch.share
            parts.append(options.cosine.weight * found["cosine"])
        return {"loss": torch.stack(parts).sum(), **found}

    def _distance(self, logits: Tensor, answer: Tensor, share: Tensor | float) -> Tensor:
        """How far the student's logits are from the teacher's, both [N, C] or the k largest of each. The numbers of a regression or reranker have no distribution.

        share: of these rows among those of all processes.
        """
        assert self._options.logits is not None
        if self._header.task == "classification" and self._header.head == "numbers":
            return number_error(logits, answer, self._variance(answer, share))
        return soft_cross_entropy(logits, answer, self._options.logits.temperature)

    def _variance(self, answer: Tensor, share: Tensor | float) -> Tensor | None:
        """The variance of numbers [N, C] over the whole batch, the mean over C; None: N is the whole batch."""
        if self._group.size == 1:
            return None
        mean = self._group.mean(answer.float().mean(0), share)
        return self._group.mean((answer.float() - mean).square().mean(), share)

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        found = self.losses(batch)
        if batch.labels is not None and self._header.task == "classification":
            logits = self.student(**batch.inputs).logits
            found["accuracy"] = (logits.argmax(-1) == batch.labels).float().mean() * batch.share
        return found


@contextlib.contextmanager
def _watch(layers: tuple[nn.Module, ...]) -> Iterator[list[Tensor]]:
    """Collect the outputs of these layers, in the order in which they run, while the context is open."""
    vectors: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda _module, _inputs, out: vectors.append(out)) for layer in layers]
    try:
        yield vectors
    finally:
        for handle in handles:
            handle.remove()


def _blocks(model: Any) -> nn.ModuleList:
    return find_blocks(model)[1]


def _projections(block: nn.Module) -> tuple[nn.Module, ...]:
    """Return a block's query, key and value layers."""
    layers = {
        name.rsplit(".", 1)[-1]: module for name, module in block.named_modules() if isinstance(module, nn.Linear)
    }
    return tuple(next(layer for name, layer in layers.items() if name in names) for names in _PROJECTIONS)


def _taken_embeddings(student: Any, teacher: Any) -> list[nn.Parameter]:
    """Return the student's embeddings that have a counterpart of the same name and shape in the teacher, and so start as copies of it."""
    theirs: Mapping[str, nn.Parameter] = dict(teacher.named_parameters())
    ours = {id(module) for module in embeddings_of(student)}
    return [
        parameter
        for name, parameter in student.named_parameters()
        if id(parameter) in ours and name in theirs and theirs[name].shape == parameter.shape
    ]


def record_of(
    options: Teaching,
    context: PassContext,
    student: Any,
    teacher: Any,
    trained: TrainingResult,
    start: float,
    extra: dict[str, Any],
) -> PassRecord:
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)]
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "losses": list(options.losses(context.header)),
            "teacher_parameters": counts[0],
            "parameters": counts[1],
            "steps": trained.steps,
            "planned_steps": trained.planned,
            "best_step": trained.best_step,
            "resumed_from": trained.resumed_from,
            "steps_per_second": round(trained.steps_per_second, 3),
            "validation": dict(trained.validation),
            **extra,
        },
        series=trained.series,
    )
