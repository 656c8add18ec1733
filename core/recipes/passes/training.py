"""The options of a training: data, schedule, early stopping and checkpoints."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nightpress.core.recipes.calibration import BUILTIN_DATA, ReadRef
from nightpress.core.recipes.costs import Cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid

_EPOCHS = 3
_PROSE_ROWS = 2000  #: approximate number of windows of 128 tokens in the built-in prose
_STATE_COPIES = 5  #: copies of the trained weights in float32: weights, gradients, two moments, the best weights so far
#: Bytes of trained weights in float32 from which on several processes hold a part each, block by block. Smaller models are whole in a batch.
SHARED_OUT_BYTES = 256 * 1024**2
_PASSES = 3  #: cost of a training step in forward passes: a backward pass costs about two


class Training(BaseModel):
    """The training loop of all passes that train. The same options and data give the same bytes, even after a kill and a resume."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True, defer_build=True)

    data: ReadRef = Field("builtin:prose", description="The data to train on. A classifier needs rows with labels.")
    length: int = Field(128, ge=8, le=131_072, description="Examples are cut at so many tokens.")
    epochs: int | None = Field(
        None, ge=1, le=1000, description="Passes over the data. Default: 3, unless `steps` are given."
    )
    steps: int | None = Field(None, ge=1, le=10_000_000, description="Number of training steps, instead of `epochs`.")
    batch: int = Field(32, ge=1, le=4096, description="Examples in a batch.")
    accumulate: int = Field(1, ge=1, le=1024, description="Batches whose gradients are summed for one step.")
    learning_rate: float = Field(5e-5, gt=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises.")
    weight_decay: float = Field(0.01, ge=0, le=1)
    clip: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: arithmetic in bfloat16 where it is safe, weights in float32. `auto`: on a GPU."
    )
    gradient_checkpointing: bool = Field(False, description="Less memory, a third more time.")
    freeze_embeddings: bool = Field(True, description="Don't train embeddings that are taken over from the model.")
    validation: float = Field(
        0.05,
        ge=0,
        le=0.5,
        description="Share of the examples for validation. The step with the best validation is kept.",
    )
    validate_every: int | None = Field(
        None, ge=1, description="Steps between two validations. Default: ten validations in all."
    )
    patience: int | None = Field(
        None, ge=1, le=1000, description="Stop after so many validations without an improvement."
    )
    checkpoint_every: int = Field(
        1000, ge=1, description="Steps between two checkpoints. There is also one every few minutes."
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "Training":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give `steps` or `epochs`, not both")
        if self.patience is not None and not self.validation:
            raise ValueError("`patience` needs a share for `validation`")
        return self

    def planned_steps(self, batches: int) -> int:
        """Return the total number of steps. batches: number of batches in an epoch."""
        return self.steps or max(1, (self.epochs or _EPOCHS) * batches // self.accumulate)

    def describe(self) -> str:
        return f"{f'{self.steps} steps' if self.steps else f'{self.epochs or _EPOCHS} epochs'} of {self.batch * self.accumulate} × {self.length} tokens"

    def check(self, name: str, header: ModelHeader) -> None:
        longest = header.config.get("max_position_embeddings") or header.config.get("n_positions")
        if isinstance(longest, int) and self.length > longest:
            raise invalid(
                f"`{name}`: a length of {self.length} tokens is more than the model's {longest} positions.",
                f"Use {longest} at most.",
            )

    def is_unlabelled(self) -> bool:
        """Return whether the data is known to have no labels without reading it: built-in data has none."""
        return self.data in BUILTIN_DATA

    def cost(self, header: ModelHeader, *, trained: float = 1.0, forwards: float = 1.0) -> Cost:
        """Return the cost of the training.

        trained: share of the parameters that learn. forwards: forward passes of the whole model per example, beside the student's own.
        """
        steps = self.planned_steps(math.ceil(_PROSE_ROWS / self.batch))
        tokens = steps * self.batch * self.accumulate * self.length
        work = tokens * header.parameters * (_PASSES * trained + forwards)
        width = int(header.config.get("hidden_size") or header.config.get("dim") or 768)
        layers = int(header.config.get("num_hidden_layers") or header.config.get("n_layers") or 12)
        activations = 4 * self.batch * self.length * width * (2 if self.gradient_checkpointing else 16) * layers
        states = 4 * header.parameters * _STATE_COPIES * trained
        memory = 4 * header.parameters + states + activations
        large = 4 * header.parameters * trained >= SHARED_OUT_BYTES
        return Cost(
            int(memory),
            0.0,
            work,
            gpu_bytes=int(memory),
            host_bytes=8 * header.parameters,  # the model and its teacher, as they are loaded
            gpu_bytes_on=(lambda gpus: int(memory - (states + activations) * (1 - 1 / gpus))) if large else None,
        )
