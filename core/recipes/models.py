"""The model of a recipe: an ordered list of passes, the exports, the calibration, the evaluation and the gates."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.calibration import BUILTIN_DATA, MIXTURE, SLICES, Calibration, DataRef
from nightpress.core.recipes.exports import TORCH_FORMATS, Export
from nightpress.core.recipes.gates import Gate, parse_gate
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import Pass, catalog
from nightpress.core.recipes.passes.named import CHECKED_ELSEWHERE
from nightpress.core.recipes.targets import Target, fill_in, misfit, target_for
from nightpress.core.recipes.yamlfile import read_yaml

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
MAX_PASSES = 20

_SHOWN_FAULTS = 100  #: the most faults of a recipe that an error lists
_UNKNOWN_NAME = "union_tag_invalid"  #: pydantic's type of the error for an unknown pass


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True, defer_build=True)


Metric = Literal[
    "perplexity",
    "masked-lm",
    "accuracy",
    "regression",
    "entities",
    "similarity",
    "retrieval",
    "ranking",
    "neighbours",
    "multiple-choice",
    "generation",
    "fidelity",
]


VectorType = Literal["float32", "int8", "binary"]


class Quality(_Model):
    """Quality on labels, on text or against the source, with a 95% interval. docs/evaluation.md describes the data of each metric.

    `auto` is perplexity for causal language models, masked-lm for masked language models, accuracy, regression or entities if the data has labels for
    them, ranking for cross-encoders, and otherwise fidelity. `fidelity` needs no labels. It gives the cosine of pooled outputs for embedders, top-1 agreement and KL
    divergence for logits, and correlations and errors for outputs that are plain numbers; for all of these also the centred cosine. Every
    other metric reports fidelity as well, if its outputs allow it.
    """

    metric: Literal["auto"] | Metric = "auto"
    data: DataRef = "builtin:prose"
    samples: int = Field(64, ge=2, le=100_000)
    length: int = Field(128, ge=8, le=131_072, description="Tokens of each sample; for `generation`, of the prompt.")
    stride: int | None = Field(
        None,
        ge=1,
        description="For perplexity: tokens that are scored in each window, after `length − stride` tokens of context; null: all.",
    )
    new_tokens: int = Field(32, ge=1, le=4096, description="For generation: tokens that the source writes.")
    dimensions: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = Field(
        (),
        max_length=8,
        exclude_if=lambda value: value == (),
        description="For neighbours: vectors truncated to these numbers of dimensions are measured beside the whole ones.",
    )
    types: tuple[VectorType, ...] = Field(
        ("float32",),
        min_length=1,
        max_length=3,
        exclude_if=lambda value: value == ("float32",),
        description="For neighbours: number types that the vectors are stored in.",
    )
    part: Literal["all", "choose", "judge"] = Field(
        "all",
        exclude_if=lambda value: value == "all",  # workers of earlier versions refuse a field that they don't know
        description="Half of the data, the same for every recipe: studies, and passes with `within`, choose with one half and judge with the other. In a recipe with such a pass, `all` becomes `judge`.",
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> "Quality":
        if self.stride is not None and self.stride > self.length:
            raise ValueError(f"a stride of {self.stride} would leave out text between windows of {self.length} tokens")
        return self


class Latency(_Model):
    """Median and 95th percentile of the time of one forward pass, for each pair of batch and length."""

    metric: Literal["latency"] = "latency"
    batch: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field((1,), min_length=1, max_length=8)
    length: tuple[Annotated[int, Field(ge=1, le=131_072)], ...] = Field((128,), min_length=1, max_length=8)
    repeats: int = Field(20, ge=3, le=1000)

    @field_validator("batch", "length", mode="before")
    @classmethod
    def _one_or_many(cls, raw: object) -> object:
        return (raw,) if isinstance(raw, int) else raw


class GenerationSpeed(_Model):
    """The speed of generation: the model reads a prompt and decodes greedily, for each pair of batch and prompt.

    The consumer decodes with the folder's own generation_config.json, including its cache. Each run generates exactly `tokens` tokens.
    """

    metric: Literal["generation-speed"] = "generation-speed"
    batch: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field((1,), min_length=1, max_length=8)
    prompt: tuple[Annotated[int, Field(ge=1, le=131_072)], ...] = Field(
        (128,), min_length=1, max_length=8, description="Tokens of the prompt."
    )
    tokens: int = Field(64, ge=2, le=4096, description="Tokens to generate. Reading the prompt gives the first.")
    repeats: int = Field(5, ge=3, le=100, description="Timed runs after a warm-up run.")

    @field_validator("batch", "prompt", mode="before")
    @classmethod
    def _one_or_many(cls, raw: object) -> object:
        return (raw,) if isinstance(raw, int) else raw


def plain_name(text: str) -> str:
    """A valid name from any text: lower case, with dashes in place of other characters."""
    name = re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")
    return name[:64] or "model"


def _which_evaluation(raw: Any) -> str:
    metric = raw.get("metric") if isinstance(raw, dict) else getattr(raw, "metric", None)
    return metric if isinstance(metric, str) and metric in {"latency", "generation-speed"} else "quality"


Evaluation = Annotated[
    Annotated[Quality, Tag("quality")]
    | Annotated[Latency, Tag("latency")]
    | Annotated[GenerationSpeed, Tag("generation-speed")],
    Discriminator(_which_evaluation),
]


class Recipe(_Model):
    """Everything that determines a job's result, except the model itself."""

    name: Name
    version: int = Field(1, ge=1)
    description: str = Field("", max_length=2000)
    target: Target | None = Field(
        None,
        description="Where the result is to run: fills in the passes and exports that are left out. `auto` goes by the model.",
    )
    passes: tuple[Pass, ...] = Field(
        (), max_length=MAX_PASSES, description="May be empty: then the exports alone change the model's form."
    )
    exports: tuple[Export, ...] = Field(
        (), max_length=8, description="Formats, e.g. `onnx`, or with a type: `{format: gguf, type: q8_0}`."
    )
    calibration: Calibration = Calibration()
    evaluate: tuple[Evaluation, ...] = Field((Quality(), Latency()), max_length=16)
    evaluate_on: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        exclude_if=lambda value: value == "auto",  # workers of earlier versions refuse a field that they don't know
        description="Where the models are measured. `auto`: on the GPU if the job runs on one, and on the processor what only runs there (ONNX, OpenVINO, GGUF, MLX). On a GPU, models are loaded in the number type that they are stored in.",
    )
    gates: dict[str, str] = Field(
        default_factory=dict, max_length=32, description='e.g. {"perplexity": "<= +3%", "size": "<= 35%"}'
    )
    screen: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="End right after the passes that change the model's files, before exports, where few texts show that the result surely misses a gate.",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto",
        description="Where the passes run. `auto` is decided when a job is planned, by what they gain on a GPU, what the model needs, and which workers there have been lately; the plan and the job say why.",
    )
    gpus: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        exclude_if=lambda value: value == 1,  # workers of earlier versions refuse a field that they don't know
        description="GPUs of one host that a job on the queue `gpu` holds. `auto` is decided when a job is planned, by what the passes gain and the largest host that there has been lately; the plan says what it comes to and why.",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1)

    @model_validator(mode="before")
    @classmethod
    def _aimed(cls, raw: Any) -> Any:
        return fill_in(raw) if isinstance(raw, dict) else raw

    @field_validator("exports")
    @classmethod
    def _no_export_twice(cls, exports: tuple[Export, ...]) -> tuple[Export, ...]:
        if len({export.name for export in exports}) != len(exports):
            raise ValueError("an export is named twice")
        return exports

    @model_validator(mode="after")
    def _says_what_comes_out(self) -> "Recipe":
        if self.target == "auto":
            if self.passes or self.exports:
                raise ValueError(
                    "`target: auto` chooses the passes and exports itself: name a target, or leave them out"
                )
        elif not self.exports or "passes" not in self.model_fields_set:
            raise ValueError("name `passes` and `exports`, or a `target` that fills them in")
        elif self.target is not None and (why := misfit(self.target, self.exports)) is not None:
            raise ValueError(why)
        return self

    @model_validator(mode="after")
    def _an_export_for_each_speed(self) -> "Recipe":
        family = next((options.family for options in self.passes if options.family), ())
        if any(export.speed is not None and export.speed not in family for export in self.exports):
            raise ValueError("an export names a `speed` that no pass makes")
        if not family:
            return self
        each = tuple(
            export if export.speed is not None else export.model_copy(update={"speed": speed})
            for export in self.exports
            for speed in (family if export.speed is None else (export.speed,))
        )
        self.__dict__["exports"] = each  # the model is frozen, and no other field depends on this one
        return self

    @model_validator(mode="after")
    def _data_that_chooses_does_not_judge(self) -> "Recipe":
        if self.searches:
            judged = tuple(
                entry.model_copy(update={"part": "judge"})
                if isinstance(entry, Quality) and entry.part == "all"
                else entry
                for entry in self.evaluate
            )
            self.__dict__["evaluate"] = judged  # the model is frozen, and no other field depends on this one
        return self

    @property
    def searches(self) -> bool:
        """Whether a pass finds the smallest result that keeps its gate, by the half of the evaluation's data that doesn't judge."""
        return any(options.gate_within is not None for options in self.passes)

    @model_validator(mode="after")
    def _gates_parse(self) -> "Recipe":
        self.parsed_gates()
        return self

    @property
    def wants_several_gpus(self) -> bool:
        """Whether the recipe names a number of GPUs above one."""
        return self.gpus != "auto" and self.gpus > 1

    @property
    def kept_off_gpus(self) -> tuple[str, ...]:
        """The passes for which the job can't run on a GPU.

        A pass that rewrites a graph runs on the processor of any worker. It decides nothing in a recipe that trains, which gains by a GPU.
        """
        trains = any(options.scope == "train" for options in self.passes)
        return tuple(
            options.name
            for options in self.passes
            if "cuda" not in options.runs_on and not (trains and options.stage in {"graph", "runtime"})
        )

    def measured_on_gpu(self, export: Export | None) -> bool:
        """Return whether a job on a GPU measures this artifact there. export: None for the source, which is measured like most artifacts.

        The source is measured on the GPU if any artifact is.
        """
        formats = [entry.format for entry in (self.exports if export is None else (export,))]
        return self.evaluate_on != "cpu" and any(name in TORCH_FORMATS for name in formats)

    def parsed_gates(self) -> tuple[Gate, ...]:
        return tuple(parse_gate(metric, bound) for metric, bound in self.gates.items())

    def data_refs(self) -> frozenset[str]:
        """Return the data sets of the recipe that are not built in."""
        refs = {evaluation.data for evaluation in self.evaluate if isinstance(evaluation, Quality)}
        if any(step.wants == "calibration" for step in self.passes) and self.calibration.data != MIXTURE:
            refs.add(self.calibration.data)
        refs |= {ref for step in self.passes for ref in step.data_refs()}
        return frozenset(refs - BUILTIN_DATA - {SLICES})


def parse_recipe(raw: Any, *, for_a_service: bool = False) -> Recipe:
    """Validate a mapping. Raises NightpressError(invalid_recipe) that lists every fault with its place.

    for_a_service: if the only faults are passes that this process does not know, accept them. The service checks them, because it may have
    other packages.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        invalid = error
    if for_a_service and all(fault["type"] == _UNKNOWN_NAME for fault in invalid.errors(include_url=False)):
        try:
            return Recipe.model_validate(raw, context=CHECKED_ELSEWHERE)
        except ValidationError as error:
            invalid = error
    found = invalid.errors(include_url=False)
    faults = [_fault(error) for error in found[:_SHOWN_FAULTS]]
    first, unknown = faults[0], unknown_pass(found[0])
    raise NightpressError(
        ErrorCode.INVALID_RECIPE,
        f"The recipe has {len(found)} fault{'s' * (len(found) > 1)}; the first at {first['at'] or 'its top'}: {first['problem']}.",
        hint=unknown[1]
        if unknown is not None
        else "`nightpress recipes` lists the built-in recipes, `nightpress recipes passes` the passes; docs/recipes.md explains every field.",
        faults=faults,
    ) from invalid


def aim(recipe: Recipe, header: ModelHeader) -> Recipe:
    """Return the recipe with `target: auto` replaced by the target for the model; other recipes unchanged.

    Raises NightpressError(invalid_recipe) if there is no target for the model.
    """
    if recipe.target != "auto":
        return recipe
    raw = recipe.model_dump(mode="json", exclude={"passes", "exports"}, exclude_unset=True)
    return parse_recipe(raw | {"target": target_for(header)})


def _fault(error: ErrorDetails) -> dict[str, str]:
    problem = error["msg"]
    if error["type"] == _UNKNOWN_NAME:
        unknown = unknown_pass(error)
        known = f"there is no pass {error['ctx']['tag']!r}; there are {error['ctx']['expected_tags']}"
        problem = known if unknown is None else unknown[0]
    return {"at": ".".join(str(part) for part in error["loc"]), "problem": problem}


def unknown_pass(error: ErrorDetails) -> tuple[str, str] | None:
    """Return (why a pass of an installed package is not known, what to do); None for every other fault."""
    return catalog.why_unknown(error["ctx"]["tag"]) if error["type"] == _UNKNOWN_NAME else None


def load_recipe(text: str) -> Recipe:
    """Read a recipe from YAML or JSON text. Raises NightpressError(invalid_recipe)."""
    return parse_recipe(read_yaml(text))
