"""Early exit: trains heads behind a classifier's blocks, and chooses the threshold at which an input leaves the model."""

import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext, over_ranks
from nightpress.core.compress.data.examples import Batch, Examples, collate, read_examples
from nightpress.core.compress.executors.holding import hold_frozen
from nightpress.core.compress.executors.objective import Aside, Objective
from nightpress.core.compress.executors.train import TrainingResult, frozen_model, precision, train
from nightpress.core.compress.model.exits import ExitModel, ExitPlan, save_heads
from nightpress.core.compress.model.networks import cast_weights, embeddings_of, load_model, save_model
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.self_speculation import speculate
from nightpress.core.compress.solvers.distillation import soft_cross_entropy
from nightpress.core.compress.solvers.exits import ExitOutcome, choose, exit_outcome, outcomes
from nightpress.core.handoff.report import PassRecord, Series
from nightpress.core.recipes.depth import depth
from nightpress.core.recipes.passes.adapt import EarlyExit

_SHOWN = 12  #: thresholds in the report


@folder_pass(EarlyExit)
def early_exit(source: Path, target: Path, options: EarlyExit, context: PassContext) -> PassRecord:
    """Train the heads (and the blocks, with `thaw`), choose the threshold, and write the model, the heads and the exit plan to `target`.

    A decoder gets self-speculative decoding instead.
    """
    if context.header.is_decoder:
        return speculate(source, target, options, context)
    work = (source, target, options)
    return cast("PassRecord", over_ranks(_early_exit, *work, samples=options.train.batch, context=context))


def _early_exit(source: Path, target: Path, options: EarlyExit, *, context: PassContext) -> PassRecord | None:
    """Do the pass in this process. Only the first process of a group writes, and returns a record."""
    start = time.monotonic()
    torch.set_num_threads(context.threads)
    header = context.header
    blocks = options.exit_blocks(header)
    examples = _read(source, options.train.data, options, context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        model = ExitModel(load_model(source, header), blocks, options.policy)
    model.model.requires_grad_(options.thaw)
    if options.train.freeze_embeddings:
        for parameter in embeddings_of(model.model):
            parameter.requires_grad_(False)
    teacher = cast_weights(load_model(source, header), precision(options.train, context.device))
    hold_frozen(teacher.requires_grad_(False).eval(), context.group, torch.device(context.device))
    if options.train.gradient_checkpointing:
        model.model.activation_checkpointing_enable()
    lesson = _HeadTraining(model, teacher, options)
    recipe = f"early-exit {options.model_dump_json()} {header.model_dump_json()}"
    trained = train(lesson, examples, options.train, context, recipe=recipe, span=(0.0, 0.95))
    if not context.group.first:
        return None

    context.progress(0.95, "choosing the threshold")
    _, held = examples.split(options.train.validation, seed=context.seed)
    if options.choose_on is not None:
        held = _read(source, options.choose_on, options, context)
    plan = ExitPlan(blocks=blocks, total=depth(header), policy=options.policy, threshold=options.threshold or 0.0)
    found: list[ExitOutcome] = []
    chosen = None
    if held is not None:
        scores, right = _looked_at(model.to(context.device), held, options, context)
        depths = np.asarray(plan.depths)
        found = outcomes(scores, right, depths)
        chosen = (
            choose(found, options.max_loss)
            if options.threshold is None
            else exit_outcome(scores, right, depths, options.threshold)
        )
        plan = plan.model_copy(update={"threshold": chosen.threshold})
    model.to("cpu")
    save_model(model.model, source, target, header)
    save_heads(target, model, plan)
    return _record(options, context, plan, chosen, found, trained, len(examples), start)


def _read(source: Path, ref: str, options: EarlyExit, context: PassContext) -> Examples:
    return read_examples(
        source,
        context.header,
        ref,
        context.data_files.get(ref),
        length=options.train.length,
        labelled=options.wants_labels(context.header),
    )


class _HeadTraining(Objective):
    """Every head learns the labels and the teacher's logits. With `thaw`, the model's own head learns them, too."""

    def __init__(self, model: ExitModel, teacher: Any, options: EarlyExit) -> None:
        super().__init__()
        self.exits = model
        self._teacher = Aside(teacher)
        self._options = options

    def train(self, mode: bool = True) -> "_HeadTraining":
        """Keep a frozen model in evaluation mode, so that the heads train on the hidden states of inference."""
        super().train(mode)
        if not self._options.thaw:
            self.exits.model.eval()
        return self

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        with frozen_model(batch.ids.device):
            answer = self._teacher.held(input_ids=batch.ids, attention_mask=batch.mask).logits
        said = self.exits(batch.ids, batch.mask).logits
        parts = []
        for logits in said if self._options.thaw else said[:-1]:
            part = self._options.alpha * soft_cross_entropy(logits, answer, self._options.temperature)
            if batch.labels is not None and self._options.alpha < 1:
                part = part + (1 - self._options.alpha) * nn.functional.cross_entropy(logits.float(), batch.labels)
            parts.append(part * batch.share)
        found = {f"exit {block}": part for block, part in zip((*self.exits.blocks, "last"), parts, strict=False)}
        return {"loss": torch.stack(parts).mean(), **found}

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        found = self.losses(batch)
        if batch.labels is not None:
            said = self.exits(batch.ids, batch.mask).logits
            for block, logits in zip((*self.exits.blocks, "last"), said, strict=True):
                found[f"accuracy {block}"] = (logits.argmax(-1) == batch.labels).float().mean() * batch.share
        return found


def _looked_at(model: ExitModel, held: Examples, options: EarlyExit, context: PassContext) -> tuple[Any, Any]:
    """Return float64 scores [E, N] of the E heads, and bool [E + 1, N]: whether each head, and full depth last, is right.

    Without labels, a prediction is right if it is that of full depth.
    """
    scores, right = [], []
    with torch.no_grad():
        for start in range(0, len(held), options.train.batch):
            chosen = np.arange(start, min(start + options.train.batch, len(held)))
            batch = collate(held, chosen, torch.device(context.device))
            heads = model(batch.ids, batch.mask)
            said = torch.stack(heads.logits).argmax(-1)
            scores.append(torch.stack(heads.scores).float().cpu().numpy())
            right.append((said == (said[-1] if batch.labels is None else batch.labels)).cpu().numpy())
    return np.concatenate(scores, axis=1).astype(np.float64), np.concatenate(right, axis=1)


def _record(
    options: EarlyExit,
    context: PassContext,
    plan: ExitPlan,
    chosen: ExitOutcome | None,
    found: list[ExitOutcome],
    trained: TrainingResult,
    examples: int,
    start: float,
) -> PassRecord:
    shown = [found[at] for at in np.unique(np.linspace(0, len(found) - 1, _SHOWN).round().astype(int))] if found else []
    series = trained.series
    if found:
        curve = sorted({(outcome.depth, outcome.accuracy) for outcome in found})
        x, y = zip(*curve, strict=True)
        series = (*series, Series(name="held-apart accuracy", x=x, y=y, x_label="blocks run, on average"))
    return PassRecord(
        index=context.index,
        name=options.name,
        seconds=time.monotonic() - start,
        summary={
            "policy": plan.policy,
            "threshold": plan.threshold,
            "exits": list(plan.blocks),
            "blocks": plan.total,
            "held_apart": None if chosen is None else _row(chosen),
            "full_depth_accuracy": found[-1].accuracy if found else None,
            "thresholds": [_row(outcome) for outcome in shown],
            "examples": examples,
            "steps": trained.steps,
            "best_step": trained.best_step,
            "resumed_from": trained.resumed_from,
            "steps_per_second": round(trained.steps_per_second, 3),
        },
        series=series,
    )


def _row(outcome: ExitOutcome) -> dict[str, Any]:
    return {
        "threshold": outcome.threshold,
        "depth": outcome.depth,
        "accuracy": outcome.accuracy,
        "share": list(outcome.share),
    }
