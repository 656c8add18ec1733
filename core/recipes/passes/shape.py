"""Options of `shape-to-speed`: an encoder's heads and channels are removed by their error and their measured time, until it is fast enough."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from nightpress.core.recipes.anatomy import OWN_SHAPES, Anatomy, anatomy_of
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.classes import reads_both_ways
from nightpress.core.recipes.costs import Cost, reshaping_cost
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.activations import StaticInt8
from nightpress.core.recipes.passes.base import GRAPHS, ExportFormat, PassOptions
from nightpress.core.recipes.passes.distill import Teaching
from nightpress.core.recipes.passes.lessons import Cosine, Hidden, Logits

Runtime = Literal["onnxruntime", "openvino"]
FORMATS: dict[Runtime, ExportFormat] = {"onnxruntime": "onnx", "openvino": "openvino"}
_SPEED = re.compile(r"\s*>=\s*(\d+(?:\.\d+)?)\s*x\s*")
_MOST = 100.0  #: the largest speed
_MULTIPLE = 32  #: widths are multiples of it: what kernels compute at a time


class ShapeToSpeed(Teaching):
    """Remove heads, channels and whole modules from an encoder until a runtime runs it as many times faster as `speed` says (ZipLM, arXiv 2302.04089).

    The time of attention and feed-forward at every width is measured in the runtime, on the worker's processor. What is removed where
    follows from these times and from the error that each removal makes. The source teaches the smaller model after each step.
    Layers get different widths. A config can't express that, so only graphs can carry the result.
    """

    spreads: ClassVar[bool] = False

    pass_: Literal["shape-to-speed"] = Field("shape-to-speed", alias="pass")
    exports: ClassVar[frozenset[ExportFormat]] = GRAPHS

    speed: str = Field(
        ">= 4x",
        description="How many times as fast as the source in float in the same runtime, e.g. `>= 4x`. Estimated from the measured table; the report shows what was reached.",
    )
    speeds: tuple[Annotated[float, Field(gt=1, le=_MOST)], ...] | None = Field(
        None,
        min_length=1,
        max_length=4,
        description="Several speeds in one job, in place of `speed`, e.g. `[2, 4, 8]`: each export is made once for each speed.",
    )
    runtime: Runtime = Field("openvino", description="The runtime whose times count.")
    type: Literal["float", "int8"] = Field(
        "float", description="The number type in which the result will run: `int8` if `static-int8` follows."
    )
    batch: int = Field(1, ge=1, le=1024, description="Texts at a time, for which times are measured.")
    length: int = Field(128, ge=8, le=4096, description="Tokens of each text, for which times are measured.")
    step: float = Field(
        2.0,
        ge=1.1,
        le=8,
        description="The model becomes at most so many times faster before it is trained again. Smaller steps cost more trainings, and lose less.",
    )
    grid: float = Field(
        0.9, ge=0.3, le=0.98, description="Ratio between neighbouring widths of the feed-forward that are measured."
    )
    samples: int = Field(256, ge=4, le=100_000, description="Examples on which the errors are measured.")
    damping: float = Field(
        0.01, gt=0, le=1, description="Added to the diagonal of the Gram matrices, as a share of its mean."
    )

    @field_validator("speed")
    @classmethod
    def _bound(cls, text: str) -> str:
        found = _SPEED.fullmatch(text)
        if found is None or not 1 < float(found[1]) <= _MOST:
            raise ValueError(f"{text!r} is not a speed like '>= 4x', more than 1x and at most {_MOST:g}x")
        return f">= {float(found[1]):g}x"

    @model_validator(mode="after")
    def _once(self) -> "ShapeToSpeed":
        if self.speeds is not None and list(self.speeds) != sorted(set(self.speeds)):
            raise ValueError("`speeds` are named from the slowest to the fastest, each once")
        return self

    @property
    def targets(self) -> tuple[float, ...]:
        """The speeds of the models that are made, the slowest first."""
        found = _SPEED.fullmatch(self.speed)
        assert found is not None
        return self.speeds or (float(found[1]),)

    @property
    def family(self) -> tuple[float, ...]:
        return self.targets if self.speeds is not None else ()

    @property
    def stages(self) -> tuple[float, ...]:
        """The speeds after which the model is trained: the targets, and speeds between them so that none is a long way from the last."""
        found, now = [], 1.0
        for target in self.targets:
            count = max(1, math.ceil(math.log(target / now, self.step) - 1e-9))
            found += [now * (target / now) ** (step / count) for step in range(1, count)]
            found.append(target)
            now = target
        return tuple(round(speed, 4) for speed in found)

    def head_levels(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The numbers of heads that a layer may keep, ascending."""
        most = max(anatomy.groups)
        return (0, most) if anatomy.family.heads_fixed else tuple(range(most + 1))

    def width_levels(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The numbers of channels that a layer may keep, ascending: a geometric grid, as ZipLM's, and none."""
        most = max(anatomy.widths)
        multiple = min(_MULTIPLE, max(1, most // 4))
        found, width = {0, most}, float(most)
        while (width := width * self.grid) >= multiple:
            found.add(min(most, max(multiple, round(width / multiple) * multiple)))
        return tuple(sorted(found))

    def describe(self) -> str:
        speeds = ", ".join(f"{speed:g}x" for speed in self.targets)
        return f"{speeds} in {self.runtime}, {self.type}, {self.batch} × {self.length} tokens; {len(self.stages)} × {self.train.describe()}"

    def student_header(self, header: ModelHeader) -> ModelHeader:
        return header

    def resolved(self, header: ModelHeader) -> "Teaching":
        if any((self.logits, self.hidden, self.relations, self.cosine)):
            return self
        chosen: dict[str, Any] = {"cosine": Cosine()} if header.task == "embedding" else {"logits": Logits()}
        return self.model_copy(update={**chosen, "hidden": Hidden()})

    def anatomy(self, header: ModelHeader) -> Anatomy:
        found = anatomy_of(header, self.name)
        inputs = (*found.family.attention.inputs, *found.family.feed_forward.inputs)
        if not reads_both_ways(header.model_type) or any(len(parts) > 1 for _, parts in inputs):
            raise invalid(
                f"`{self.name}` can't take a {header.model_type}: it takes encoders with separate layers for query, key and value.",
                "Use `channels`, `heads` or `distill`.",
            )
        return found

    def check(self, header: ModelHeader) -> None:
        self.anatomy(header)
        if OWN_SHAPES in header.config:
            raise invalid(f"`{self.name}`: the layers of this model differ already.", "Bring the whole model.")
        if self.relations is not None:
            raise invalid(
                f"`{self.name}`: `relations` needs queries, keys and values, which a layer may lose.", "Use `hidden`."
            )
        if header.positions is not None and self.length > header.positions:
            raise invalid(
                f"`{self.name}`: a length of {self.length} tokens is more than the model's {header.positions} positions.",
                f"Use {header.positions} at most.",
            )
        super().check(header)

    def check_beside(self, passes: Sequence[PassOptions], header: ModelHeader | None) -> None:
        later = passes[passes.index(self) + 1 :]
        if self.type == "int8" and not any(isinstance(options, StaticInt8) for options in later):
            raise invalid(
                f"`{self.name}`: `type: int8` counts on `static-int8`, and it does not follow.",
                "Add `{pass: static-int8}` behind it, or use `type: float`.",
            )
        folder = [options.name for options in later if options.stage == "folder"]
        if self.family and folder:
            raise invalid(
                f"`{self.name}`: `{folder[0]}` can't follow several `speeds`, because it reads one model.",
                "Give each `speed` a recipe of its own, or leave it out.",
            )
        if self.family and any(options.gate_within is not None for options in later):
            raise invalid(
                f"`{self.name}`: a pass with `within` can't follow several `speeds`, because it chooses one graph.",
                "Give each `speed` a recipe of its own.",
            )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        yield from super().warnings(header)
        yield f"`{self.name}` measures times on the worker's processor: run it on one like those that will run the result."

    def why_not(self, header: ModelHeader | None) -> str:
        return "layers of differing widths can't be said in a config"

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        levels = 0
        if header.tensors:
            anatomy = self.anatomy(header)
            levels = len(self.head_levels(anatomy)) + len(self.width_levels(anatomy))
        reshaping = reshaping_cost(
            header,
            tokens=self.samples * self.train.length,
            levels=levels,
            shape=self.batch * self.length,
            stages=len(self.stages),
        )
        return reshaping.then(self.train.cost(header).times(len(self.stages)))
