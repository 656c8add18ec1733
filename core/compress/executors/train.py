"""The train executor: the training loop of every pass that trains. After a kill, it resumes exactly.

A step depends only on its number, the weights and the optimizer's moments. The learning rate, the examples of a batch and the seed of
dropout are computed from the number. So a checkpoint holds the weights, the moments and the number, in one safetensors file that atomically
replaces the previous one. A resumed run ends with the same bytes as a run that was never killed.

Several processes take the same batches as one does, and each computes a part of every batch. See `parameters` for what each holds.
"""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Batch, Examples, batch_order, collate
from nightpress.core.compress.executors.holding import hold
from nightpress.core.compress.executors.objective import Objective
from nightpress.core.compress.executors.reproducible import backward, reproducible
from nightpress.core.compress.executors.training_state import TrainingState, read_checkpoint, write_checkpoint
from nightpress.core.compress.model.networks import embeddings_of
from nightpress.core.compress.ranks.group import exchanging
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Series
from nightpress.core.recipes.passes.training import Training

_CURVE_POINTS = 100
_VALIDATIONS = 10
_CHECKPOINT_S = 180.0
_SAY_S = 1.0
_RANK_SEED = 0x1F_FFFF_FFFF_FFFF  #: between the seeds of two processes, so that their dropout differs

#: (examples, number of the epoch) → the epoch's examples
Renewal = Callable[[Examples, int], Examples]


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training. The objective has the weights of the best validation, or of the last step without validation."""

    steps: int  #: steps that were done; fewer than planned if training stopped early
    planned: int
    best_step: int
    seconds: float  #: of this attempt
    steps_per_second: float  #: of this attempt's steps, without validation and checkpoints
    resumed_from: int
    series: tuple[Series, ...]
    validation: Mapping[str, float]  #: at the best step
    before: Mapping[str, float]  #: as `validation`, before the training; empty: not asked for


def train(
    objective: Objective,
    examples: Examples,
    options: Training,
    context: PassContext,
    *,
    recipe: str,
    span: tuple[float, float] = (0.0, 1.0),
    zeros: Mapping[str, Tensor] | None = None,
    measured: bool = False,
    renewed: Renewal | None = None,
) -> TrainingResult:
    """Train until all planned steps are done, or until validation stops improving.

    objective: its parameters and buffers are changed in place. Afterwards it is in evaluation mode.
    `recipe` identifies what is done: only a checkpoint with the same recipe is resumed. `span`: the training's part of the pass's progress.
    zeros: by the names of parameters, bool of the same shapes: elements that are zero and stay so. measured: also validate before the training.
    renewed: makes the examples of each epoch, as many as it gets, and the same in all processes; None: all epochs have the same.
    Raises NightpressError: numerical_failure if the loss is not finite, gpu_out_of_memory, disk_full or invalid_data. Raises PeerError if
    another process of the context's group did not take part.
    """
    with reproducible(context.device), exchanging():
        try:
            found = _Run(objective, examples, options, context, recipe, span, zeros or {}, measured, renewed).run()
            objective.eval()
            return found
        except torch.cuda.OutOfMemoryError as error:
            raise NightpressError(
                ErrorCode.GPU_OUT_OF_MEMORY,
                f"The GPU's memory does not hold a batch of {options.batch} × {options.length} tokens in training.",
                hint="Use a smaller `batch` with more `accumulate`, or `gradient_checkpointing: true`.",
            ) from error


def learning_rate(step: int, total: int, options: Training) -> float:
    """The learning rate of step `step`, counted from 0. It rises linearly during the warm-up, then follows the schedule."""
    rising = round(options.warmup * total)
    if step < rising:
        return options.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, total - rising)
    share = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[options.schedule]
    return options.learning_rate * share


def precision(options: Training, device: str) -> torch.dtype:
    """The dtype of the training's arithmetic."""
    if options.precision == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return torch.bfloat16 if options.precision == "bf16" else torch.float32


@contextlib.contextmanager
def frozen_model(device: torch.device) -> Iterator[None]:
    """A context in which a frozen model runs: without autocast, so in the dtype of its weights, and without recording gradients.

    Not in inference mode: a loss that keeps its answers for the gradient could not use them.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _seed(seed: int, device: torch.device) -> None:
    """Seed the CPU and this device. torch.manual_seed also records a stack trace for each absent kind of device: 0.5 ms per step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class _Run:
    def __init__(
        self,
        objective: Objective,
        examples: Examples,
        options: Training,
        context: PassContext,
        recipe: str,
        span: tuple[float, float],
        zeros: Mapping[str, Tensor],
        measured: bool,
        renewed: Renewal | None,
    ) -> None:
        self.options, self.context, self.span, self.group = options, context, span, context.group
        self.learn, self.held = examples.split(options.validation, seed=context.seed)
        self.device = torch.device(context.device)
        self.dtype = precision(options, context.device)
        self.per_epoch = self.learn.batches(options.batch)
        self.total = options.planned_steps(self.per_epoch)
        self.every = options.validate_every or max(1, self.total // _VALIDATIONS)
        self.point = max(1, self.total // _CURVE_POINTS)
        self.parameters = hold(objective, self.group, self.device)
        self.objective = self.parameters.module
        self.kept: dict[str, Tensor] = {**self.parameters.own, **dict(self.objective.named_buffers())}
        self.zeros = {name: zero[self.parameters.rows(name)].to(self.device) for name, zero in zeros.items()}
        self.measured = measured
        self.optimizer = torch.optim.AdamW(self._groups(), lr=options.learning_rate, fused=True)
        self.state = TrainingState()
        self.best: dict[str, Tensor] = {}
        self.sums = torch.zeros(0)  #: [names] float64, sums of this process's losses since the curve's last point
        self._share = torch.tensor(1 / options.accumulate, device=self.device)
        self._renewed, self._read = renewed, self.learn
        self._order: tuple[int, list[NDArray[np.int64]]] = (-1, [])
        processes = f"{self.group.size} processes\n" if self.group.size > 1 else ""
        digest = hashlib.sha256(
            f"{context.index}\n{recipe}\n{options.model_dump_json()}\n{context.seed}\n{self.device.type}\n{self.dtype}\n{processes}".encode()
        )
        digest.update(examples.digest())
        for name in self.parameters.own:
            digest.update(f"{name} {self.parameters.shape(name)}\n".encode())
        self.file = context.work_dir / "train" / digest.hexdigest()[:16] / "checkpoint.safetensors"

    def run(self) -> TrainingResult:
        started = time.monotonic()
        before = self._means(self.held) if self.measured and self.held is not None else {}
        first = self._resume()
        stepping = 0.0
        said = saved = time.monotonic()
        self.objective.train()
        while self.state.step < self.total and not self._stops():
            begun = time.monotonic()
            self._step(self.state.step)
            self.state.step += 1
            self.state.counted += 1
            if self.state.step % self.point == 0 or self.state.step == self.total:
                self._add_point()
            stepping += time.monotonic() - begun
            if self.held is not None and (self.state.step % self.every == 0 or self.state.step == self.total):
                self._validate(self.held)
                self.objective.train()
            now = time.monotonic()
            if now - said > _SAY_S:
                self._say(first, stepping)
                said = now
            late = self.group.first and now - saved > _CHECKPOINT_S
            if self.state.step % self.options.checkpoint_every == 0 or self.group.total(int(late)):
                self._save()
                saved = time.monotonic()
        self._save()  # so that another attempt does not repeat the steps
        self._take_best()
        done = self.state.step - first
        return TrainingResult(
            steps=self.state.step,
            planned=self.total,
            best_step=self.state.best_step or self.state.step,
            seconds=time.monotonic() - started,
            steps_per_second=done / stepping if stepping else 0.0,
            resumed_from=first,
            series=tuple(
                Series(name=name, x=tuple(float(step) for step, _ in points), y=tuple(value for _, value in points))
                for name, points in self.state.curves.items()
            ),
            validation=self.state.validation,
            before=before,
        )

    # A step ------------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.total, self.options)
        for part in range(self.options.accumulate):
            number = step * self.options.accumulate + part
            batch = self._batch(number)
            with self._arithmetic():
                losses = self.objective.losses(batch)
            backward(losses["loss"], self._share)
            seen = torch.stack([loss.detach() for loss in losses.values()]).double() / self.options.accumulate
            self.sums = self.sums + seen if len(self.sums) else seen
            self.state.names = list(losses)
        self.parameters.take_gradients()
        for name, zero in self.zeros.items():
            gradient = self.parameters.own[name].grad
            if gradient is not None:
                gradient.masked_fill_(zero, 0)  # weight decay does not change a zero
        self.parameters.clip(self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups: weight decay for matrices, none for vectors and embeddings: rows of tokens that no text has would only shrink."""
        tables = {id(parameter) for parameter in embeddings_of(self.objective)}
        names = {name for name, parameter in self.objective.named_parameters() if id(parameter) in tables}
        own = self.parameters.own
        decays = {name for name, part in own.items() if part.dim() > 1} - names
        groups = [
            {
                "params": [part for name, part in own.items() if name in decays],
                "weight_decay": self.options.weight_decay,
            },
            {"params": [part for name, part in own.items() if name not in decays], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _batch(self, number: int) -> Batch:
        epoch, at = divmod(number, self.per_epoch)
        if self._order[0] != epoch:
            if self._renewed is not None:
                self._read = self._renewed(self.learn, epoch)
            self._order = epoch, batch_order(self._read, self.options.batch, seed=self.context.seed, epoch=epoch)
        return self._part(self._read, self._order[1][at], number)

    def _part(self, examples: Examples, chosen: NDArray[np.int64], number: int) -> Batch:
        """This process's part of a batch. Its number seeds all random numbers."""
        seed = (self.context.seed << 32) + number
        _seed((seed + self.group.rank * _RANK_SEED) % (1 << 64), self.device)
        return collate(examples, chosen, self.device, seed=seed, part=self.group.share(len(chosen), number))

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    # Curves and validation ---------------------------------------------------------------------------------------------

    def _add_point(self) -> None:
        self.group.sum(self.sums)
        for name, added in zip(self.state.names, self.sums.tolist(), strict=True):
            mean = added / self.state.counted
            if not math.isfinite(mean):
                raise NightpressError(
                    ErrorCode.NUMERICAL_FAILURE,
                    f"The training left the finite numbers before step {self.state.step}: its {name} is {mean}.",
                    hint="Use a smaller `learning_rate`, a longer `warmup`, or `precision: fp32`.",
                    step=self.state.step,
                )
            self._plot(f"train {name}", mean)
        self.sums, self.state.counted = torch.zeros(0), 0

    def _means(self, held: Examples) -> dict[str, float]:
        """The means by name over the validation examples, with the present weights."""
        self.objective.eval()
        totals: dict[str, float] = {}
        order = np.argsort([len(row) for row in held.ids], kind="stable")
        with torch.no_grad(), self._arithmetic():
            for start in range(0, len(order), self.options.batch):
                batch = self._part(held, order[start : start + self.options.batch], start)
                for name, mean in self.objective.validate(batch).items():
                    totals[name] = totals.get(name, 0.0) + float(mean) * batch.whole
        self.parameters.between_batches()
        added = torch.tensor(list(totals.values()), dtype=torch.float64)
        self.group.sum(added)
        return {name: total / len(held) for name, total in zip(totals, added.tolist(), strict=True)}

    def _validate(self, held: Examples) -> None:
        found = self._means(held)
        for name, value in found.items():
            self._plot(f"validation {name}", value)
        self.state.waited += 1
        if found["loss"] < self.state.best:
            self.state.best, self.state.best_step, self.state.waited = found["loss"], self.state.step, 0
            self.state.validation = found
            self.best = {name: tensor.detach().clone() for name, tensor in self.kept.items()}

    def _stops(self) -> bool:
        return self.options.patience is not None and self.state.waited >= self.options.patience

    @torch.no_grad()
    def _take_best(self) -> None:
        for name, value in self.best.items():
            self.kept[name].copy_(value)
        self.parameters.settle()

    def _plot(self, name: str, value: float) -> None:
        self.state.curves.setdefault(name, []).append((self.state.step, value))
        self.context.metric(name.replace(" ", "."), value, self.state.step)

    def _say(self, first: int, stepping: float) -> None:
        rate = (self.state.step - first) / stepping
        left = (self.total - self.state.step) / rate
        points = self.state.curves.get("train loss")
        loss = f", loss {points[-1][1]:.4f}" if points else ""
        start, end = self.span
        self.context.progress(
            start + (end - start) * self.state.step / self.total,
            f"step {self.state.step} of {self.total}{loss}, {rate:.2f} steps/s, {left:.0f} s left",
        )

    # Checkpoints -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        sums = torch.tensor(self.group.collect(self.sums.tolist()), dtype=torch.float64)
        parts = {f"module.{name}": tensor for name, tensor in self.kept.items()}
        parts |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, part in self.parameters.own.items():
            parts |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[part].items()}
        write_checkpoint(self.file, self.parameters, parts, sums, self.state, self.group)
        self.context.checkpoint(self.file.relative_to(self.context.work_dir).as_posix(), self.state.step)

    def _resume(self) -> int:
        """Load the checkpoint of an earlier attempt, if there is one. Returns the number of steps that are done."""
        if not self.group.collect(self.file.is_file())[0]:
            return 0
        found = read_checkpoint(self.file, self.parameters, self.group)
        self.state = found.state
        self.sums = found.sums.to(self.device)
        with torch.no_grad():
            for name, tensor in self.kept.items():
                tensor.copy_(found.module[name])
        self.best = {name: tensor.to(self.device) for name, tensor in found.best.items()}
        for name, moments in found.optimizer.items():
            self.optimizer.state[self.parameters.own[name]] = {
                key: value.to(self.device) for key, value in moments.items()
            }
        self.context.progress(self.span[0], f"going on at step {self.state.step} of {self.total}")
        return self.state.step
