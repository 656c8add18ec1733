"""The train executor: the training loop of every pass that trains. After a kill, it resumes exactly.

A step depends only on its number, the weights and the optimizer's moments. The learning rate, the examples of a batch and the seed of
dropout are computed from the number. So a checkpoint holds the weights, the moments and the number, in one safetensors file that atomically
replaces the previous one. A resumed run ends with the same bytes as a run that was never killed.
"""

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.examples import Batch, Examples, batch_order, collate
from nightpress.core.compress.executors.reproducible import backward, reproducible
from nightpress.core.compress.model.checkpoint import disk_errors, sync_folder
from nightpress.core.compress.model.networks import embeddings_of
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import Series
from nightpress.core.recipes.passes.training import Training

_CURVE_POINTS = 100
_VALIDATIONS = 10
_CHECKPOINT_S = 180.0
_SAY_S = 1.0


#: (examples, number of the epoch) → the epoch's examples
Renewal = Callable[[Examples, int], Examples]


class Objective(Protocol):
    """A module to train, and its loss."""

    @property
    def module(self) -> nn.Module:
        """Everything that is trained or has state, as one module. A checkpoint holds its trainable parameters and its buffers."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch by name, 0-dimensional. Training minimises the one named `loss`."""

    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch by name, in evaluation mode. The weights with the smallest `loss` are the best."""


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training. The objective's module has the weights of the best validation, or of the last step without validation."""

    steps: int  #: steps that were done; fewer than planned if training stopped early
    planned: int
    best_step: int
    seconds: float  #: of this attempt
    steps_per_second: float  #: of this attempt's steps, without validation and checkpoints
    resumed_from: int
    series: tuple[Series, ...]
    validation: Mapping[str, float]  #: at the best step


@dataclass
class _State:
    """Everything, other than tensors, that a later step depends on."""

    step: int = 0
    best_step: int = 0
    best: float = math.inf
    waited: int = 0  #: validations since the best one
    counted: int = 0  #: steps whose losses are in the sum for the curve's next point
    names: list[str] = field(default_factory=list)  #: names of those losses
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


def train(
    objective: Objective,
    examples: Examples,
    options: Training,
    context: PassContext,
    *,
    recipe: str,
    span: tuple[float, float] = (0.0, 1.0),
    renewed: Renewal | None = None,
) -> TrainingResult:
    """Train until all planned steps are done, or until validation stops improving.

    `recipe` identifies what is done: only a checkpoint with the same recipe is resumed. `span`: the training's part of the pass's progress.
    `renewed` makes the examples of each epoch, as many as it gets; None: all epochs have the same.
    Raises NightpressError: numerical_failure if the loss is not finite, gpu_out_of_memory, disk_full or invalid_data.
    """
    with reproducible(context.device):
        try:
            return _Run(objective, examples, options, context, recipe, span, renewed).run()
        except torch.cuda.OutOfMemoryError as error:
            raise NightpressError(
                ErrorCode.GPU_OUT_OF_MEMORY,
                f"The GPU's memory does not hold a batch of {options.batch} × {options.length} tokens in training.",
                hint="Use a smaller `batch` with more `accumulate`, or `gradient_checkpointing: true`.",
            ) from error


def validation_losses(
    objective: Objective, examples: Examples, options: Training, context: PassContext
) -> dict[str, float]:
    """The means by name over the validation examples of `train`, with the present weights; empty if there are no such examples."""
    _, held = examples.split(options.validation, seed=context.seed)
    if held is None:
        return {}
    with reproducible(context.device):
        return _means(objective, held, options, context)


def _means(objective: Objective, held: Examples, options: Training, context: PassContext) -> dict[str, float]:
    device, dtype = torch.device(context.device), precision(options, context.device)
    objective.module.eval()
    totals: dict[str, float] = {}
    order = np.argsort([len(row) for row in held.ids], kind="stable")
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for start in range(0, len(order), options.batch):
            _seed((context.seed << 32) + start, device)
            batch = collate(held, order[start : start + options.batch], device)
            for name, mean in objective.validate(batch).items():
                totals[name] = totals.get(name, 0.0) + float(mean) * len(batch.ids)
    return {name: total / len(held) for name, total in totals.items()}


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
        renewed: Renewal | None,
    ) -> None:
        self.objective, self.options, self.context, self.span = objective, options, context, span
        self.learn, self.held = examples.split(options.validation, seed=context.seed)
        self.device = torch.device(context.device)
        self.dtype = precision(options, context.device)
        self.per_epoch = self.learn.batches(options.batch)
        self.total = options.planned_steps(self.per_epoch)
        self.every = options.validate_every or max(1, self.total // _VALIDATIONS)
        self.point = max(1, self.total // _CURVE_POINTS)
        module = objective.module
        self.learned = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.buffers = dict(module.named_buffers())
        self.optimizer = torch.optim.AdamW(self._groups(), lr=options.learning_rate, fused=True)
        self.state = _State()
        self.best: dict[str, Tensor] = {}
        self.sums = torch.zeros(0)  #: [names] float64, sums of the losses since the curve's last point
        self._share = torch.tensor(1 / options.accumulate, device=self.device)
        self._renewed, self._read = renewed, self.learn
        self._order: tuple[int, list[NDArray[np.int64]]] = (-1, [])
        digest = hashlib.sha256(
            f"{context.index}\n{recipe}\n{options.model_dump_json()}\n{context.seed}\n{self.device.type}\n{self.dtype}\n".encode()
        )
        digest.update(examples.digest())
        for name, parameter in self.learned.items():
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        self.file = context.work_dir / "train" / digest.hexdigest()[:16] / "checkpoint.safetensors"

    def run(self) -> TrainingResult:
        started = time.monotonic()
        first = self._resume()
        stepping = 0.0
        said = saved = time.monotonic()
        self.objective.module.train()
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
                self.objective.module.train()
            now = time.monotonic()
            if now - said > _SAY_S:
                self._say(first, stepping)
                said = now
            if self.state.step % self.options.checkpoint_every == 0 or now - saved > _CHECKPOINT_S:
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
        )

    # A step ------------------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.total, self.options)
        for part in range(self.options.accumulate):
            number = step * self.options.accumulate + part
            _seed((self.context.seed << 32) + number, self.device)
            batch = self._batch(number)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                losses = self.objective.losses(batch)
            backward(losses["loss"], self._share)
            seen = torch.stack([loss.detach() for loss in losses.values()]).double() / self.options.accumulate
            self.sums = self.sums + seen if len(self.sums) else seen
            self.state.names = list(losses)
        torch.nn.utils.clip_grad_norm_(self.learned.values(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups: weight decay for matrices, none for vectors and embeddings: rows of tokens that no text has would only shrink."""
        tables = {id(parameter) for parameter in embeddings_of(self.objective.module)}
        decays = [
            parameter for parameter in self.learned.values() if parameter.dim() > 1 and id(parameter) not in tables
        ]
        stays = [parameter for parameter in self.learned.values() if parameter.dim() <= 1 or id(parameter) in tables]
        groups = [
            {"params": decays, "weight_decay": self.options.weight_decay},
            {"params": stays, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _batch(self, number: int) -> Batch:
        epoch, at = divmod(number, self.per_epoch)
        if self._order[0] != epoch:
            if self._renewed is not None:
                self._read = self._renewed(self.learn, epoch)
            self._order = epoch, batch_order(self._read, self.options.batch, seed=self.context.seed, epoch=epoch)
        return collate(self._read, self._order[1][at], self.device)

    # Curves and validation ---------------------------------------------------------------------------------------------

    def _add_point(self) -> None:
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

    def _validate(self, held: Examples) -> None:
        found = _means(self.objective, held, self.options, self.context)
        for name, value in found.items():
            self._plot(f"validation {name}", value)
        self.state.waited += 1
        if found["loss"] < self.state.best:
            self.state.best, self.state.best_step, self.state.waited = found["loss"], self.state.step, 0
            self.state.validation = found
            self.best = {name: tensor.detach().clone() for name, tensor in self._kept().items()}

    def _stops(self) -> bool:
        return self.options.patience is not None and self.state.waited >= self.options.patience

    def _take_best(self) -> None:
        kept = self._kept()
        with torch.no_grad():
            for name, value in self.best.items():
                kept[name].copy_(value)
        self.objective.module.eval()

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

    def _kept(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds: trainable parameters and buffers. All others stay as they were loaded."""
        return {**self.learned, **self.buffers}

    def _save(self) -> None:
        tensors = {f"module.{name}": tensor.detach() for name, tensor in self._kept().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors["sums"] = self.sums
        for name, parameter in self.learned.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with disk_errors():
            save_file(_unshared(whole), partial, metadata={"state": json.dumps(asdict(self.state))})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(self.file)
            sync_folder(self.file.parent)
        self.context.checkpoint(self.file.relative_to(self.context.work_dir).as_posix(), self.state.step)

    def _resume(self) -> int:
        """Load the checkpoint of an earlier attempt, if there is one. Returns the number of steps that are done."""
        if not self.file.is_file():
            return 0
        with safe_open(self.file, framework="pt", device="cpu") as file:
            raw = json.loads(file.metadata()["state"])
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        self.state = _State(**raw)
        kept = self._kept()
        with torch.no_grad():
            for name, tensor in kept.items():
                tensor.copy_(found[f"module.{name}"])
        self.best = {
            name.removeprefix("best."): tensor.to(self.device)
            for name, tensor in found.items()
            if name.startswith("best.")
        }
        self.sums = found["sums"].to(self.device)
        for name, parameter in self.learned.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                stored = found.get(f"optimizer.{key}.{name}")
                if stored is not None:
                    self.optimizer.state[parameter][key] = stored.to(self.device)
        self.context.progress(self.span[0], f"going on at step {self.state.step} of {self.total}")
        return self.state.step


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with an earlier one, e.g. a buffer with two names: safetensors refuses shared memory."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if tensor.numel() and pointer in seen else tensor
        seen.add(pointer)
    return out
