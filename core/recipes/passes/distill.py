"""Distillation: options of the passes in which a model learns from a teacher."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from nightpress.core.recipes.bounds import kind_flaw, size_flaw
from nightpress.core.recipes.calibration import Calibration
from nightpress.core.recipes.costs import Cost
from nightpress.core.recipes.depth import depth, evenly, width
from nightpress.core.recipes.header import SHARED_BLOCKS, ModelHeader
from nightpress.core.recipes.linears import invalid
from nightpress.core.recipes.passes.base import ExportFormat, Need, PassOptions, Scope
from nightpress.core.recipes.passes.lessons import Blocks, Cosine, Hidden, Logits, Lora, Part, Relations
from nightpress.core.recipes.passes.training import Training

#: Blocks, width, heads and feed-forward width, as in Turc et al., Well-Read Students Learn Better (arXiv 1908.08962).
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (2, 128, 2, 512),
    "mini": (4, 256, 4, 1024),
    "small": (4, 512, 8, 2048),
    "medium": (8, 512, 8, 2048),
}
#: Size → its keys in the families' configs. The first key that a config has is used.
_KEYS = {
    "layers": ("num_hidden_layers", "n_layers", "n_layer"),
    "width": ("hidden_size", "dim", "n_embd"),
    "heads": ("num_attention_heads", "n_heads", "n_head"),
    "inner": ("intermediate_size", "hidden_dim", "ffn_dim", "n_inner"),
}
#: Families with separate layers for query, key and value.
SEPARATE_PROJECTIONS = frozenset(
    {
        "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "deberta-v2",
        "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "opt",
    }
)  # fmt: skip


class Student(Part):
    """The model that learns. `layers` cuts it from the teacher; `preset` or `config` defines a new one. Default: half the teacher's blocks.

    Tensors of the same shape as the teacher's start as copies of the teacher's. All others start at random.
    """

    layers: int | Blocks | None = Field(
        None,
        description="Blocks of the teacher that the student keeps: how many, evenly spread, or which ones, counted from 0.",
    )
    preset: Literal["tiny", "mini", "small", "medium"] | None = Field(
        None, description="2×128, 4×256, 4×512 or 8×512 (blocks × width)."
    )
    config: dict[str, int | float | str | bool] = Field(
        default_factory=dict, max_length=50, description="Values of config.json in place of the teacher's."
    )

    @model_validator(mode="after")
    def _one_way(self) -> "Student":
        if self.layers is not None and (self.preset or self.config):
            raise ValueError("`layers` cuts a student from the teacher; a `preset` or a `config` draws up another")
        if isinstance(self.layers, int) and self.layers < 1:
            raise ValueError("`layers` must leave a block")
        if isinstance(self.layers, tuple) and list(self.layers) != sorted(set(self.layers)):
            raise ValueError("`layers` names a block twice or out of order")
        return self

    @property
    def cut(self) -> bool:
        return not (self.preset or self.config)

    def changes(self, header: ModelHeader) -> dict[str, Any]:
        """Return the values of the student's config.json that differ from the teacher's."""
        changes: dict[str, Any] = {}
        if self.cut:
            changes[_key("layers", header)] = len(self.layer_map(header))
        if self.preset:
            for what, value in zip(("layers", "width", "heads", "inner"), PRESETS[self.preset], strict=True):
                changes[_key(what, header)] = value
            if "num_key_value_heads" in header.config:
                changes["num_key_value_heads"] = changes[_key("heads", header)]
            if header.config.get("head_dim"):
                changes["head_dim"] = 64
            if header.model_type == "electra":
                changes["embedding_size"] = changes["hidden_size"]
        return changes | self.config

    def layer_map(self, header: ModelHeader) -> tuple[int, ...]:
        """Return for each of the student's blocks the teacher's block from which it starts."""
        blocks = depth(header)
        if isinstance(self.layers, tuple):
            return self.layers
        if self.layers is not None:
            count = self.layers
        elif self.cut:
            count = max(1, blocks // 2)
        else:
            changes = self.changes(header)
            count = int(changes.get(_key("layers", header), blocks))
        return evenly(count, blocks)


class Teaching(PassOptions):
    """A pass in which a model learns from a teacher, which is frozen and in evaluation mode."""

    needs: ClassVar[Need] = "training"
    scope: ClassVar[Scope] = "train"
    spreads: ClassVar[bool] = True
    exports: ClassVar[frozenset[ExportFormat]] = frozenset({"safetensors", "compressed-tensors", "onnx", "openvino"})

    train: Training = Training()
    logits: Logits | None = Field(None, description="Default where nothing else is named and the model has logits.")
    hidden: Hidden | None = None
    relations: Relations | None = None
    cosine: Cosine | None = Field(None, description="Default for embedders.")
    altered: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the texts that are altered in each pass over the data: tokens hidden or replaced, parts taken, two texts joined. The teacher answers for them. Helps where texts are few.",
    )

    def data_refs(self) -> frozenset[str]:
        return frozenset({self.train.data})

    def wants_labels(self, header: ModelHeader | None) -> bool:
        task = None if header is None else header.task
        return self.logits is not None and self.logits.alpha < 1 and task in {None, "classification"}

    def student_header(self, header: ModelHeader) -> ModelHeader:
        """Return the header of the model that learns. Only its config is the student's; the tensors are the teacher's."""
        raise NotImplementedError

    def resolved(self, header: ModelHeader) -> "Teaching":
        """Return the same options with the default loss if no loss is named."""
        if any((self.logits, self.hidden, self.relations, self.cosine)):
            return self
        chosen: dict[str, Any] = {"cosine": Cosine()} if header.task == "embedding" else {"logits": Logits()}
        return self.model_copy(update=chosen)

    def losses(self, header: ModelHeader) -> tuple[str, ...]:
        whole = self.resolved(header)
        return tuple(name for name in ("logits", "hidden", "relations", "cosine") if getattr(whole, name) is not None)

    def check(self, header: ModelHeader) -> None:
        if header.task == "token-classification":
            raise invalid(
                f"`{self.name}` can't teach a token classifier.", "It takes classifiers, embedders and language models."
            )
        self.train.check(self.name, header)
        if depth(header) == 0:
            raise invalid(
                f"`{self.name}`: the model's config doesn't say how many blocks it has.",
                "Save it with a current transformers.",
            )
        student, whole = self.student_header(header), self.resolved(header)
        if header.task == "embedding" and whole.logits is not None:
            raise invalid(
                f"`{self.name}`: an embedder has no logits to learn from.", "Use `cosine`, `hidden` or `relations`."
            )
        if header.task != "embedding" and whole.cosine is not None:
            raise invalid(
                f"`{self.name}`: `cosine` compares an embedder's vectors; this is a model for {header.task}.",
                "Use `logits`.",
            )
        if self.wants_labels(header) and self.train.is_unlabelled():
            raise invalid(
                f"`{self.name}`: `alpha` {whole.logits.alpha if whole.logits else 0:g} learns from labels, and {self.train.data} has none.",
                "Name a data set of rows with `text` and `label` in `train.data`, or use `alpha: 1`.",
            )
        if whole.logits is not None and whole.logits.cache and len(self.losses(header)) > 1:
            raise invalid(
                f"`{self.name}`: the teacher runs at every step for {', '.join(self.losses(header)[1:])}, so caching its logits saves nothing.",
                "Leave `cache` out, or the other losses.",
            )
        if self.altered and header.task not in {"classification", "embedding"}:
            raise invalid(
                f"`{self.name}`: `altered` is for models with one answer for each text; this is a model for {header.task}.",
                "Leave it out.",
            )
        if self.altered and whole.logits is not None and whole.logits.cache:
            raise invalid(
                f"`{self.name}`: the teacher must answer anew for `altered` texts, so its logits can't be cached.",
                "Leave `cache` or `altered` out.",
            )
        self._check_hidden(header, student)
        self._check_relations(header, student)

    def _check_hidden(self, header: ModelHeader, student: ModelHeader) -> None:
        if self.hidden is None or self.hidden.layers is None:
            return
        if max(self.hidden.layers) >= depth(header):
            raise invalid(
                f"`{self.name}`: hidden.layers names block {max(self.hidden.layers)}; the teacher has {depth(header)}.",
                f"Blocks are counted from 0 to {depth(header) - 1}.",
            )
        if len(self.hidden.layers) != depth(student):
            raise invalid(
                f"`{self.name}`: hidden.layers names {len(self.hidden.layers)} blocks; the student has {depth(student)}.",
                "Name one of the teacher's blocks for each of the student's.",
            )

    def _check_relations(self, header: ModelHeader, student: ModelHeader) -> None:
        if self.relations is None:
            return
        if header.model_type not in SEPARATE_PROJECTIONS:
            raise invalid(
                f"`{self.name}`: relations need query, key and value layers of their own, which a {header.model_type} has not.",
                "Use `hidden` instead.",
            )
        if not -depth(header) <= self.relations.layer < depth(header):
            raise invalid(
                f"`{self.name}`: relations.layer is {self.relations.layer}; the teacher has {depth(header)} blocks.",
                f"Use −1, or 0 to {depth(header) - 1}.",
            )
        for who, side in (("teacher", header), ("student", student)):
            if width(side) % self.relations.heads:
                raise invalid(
                    f"`{self.name}`: relations.heads {self.relations.heads} does not divide the {who}'s width of {width(side)}.",
                    "Use a divisor of both.",
                )

    def warnings(self, header: ModelHeader | None) -> Iterable[str]:
        if self.train.is_unlabelled() and header is not None and header.task == "classification":
            yield f"`{self.name}`: a classifier learns best from texts like those it is used on; {self.train.data} is prose from novels."


class Distill(Teaching):
    """Train a smaller student with the model as its teacher. The result is a normal checkpoint.

    The student is cut from the teacher, or a new model. It learns the teacher's logits, hidden states, attention relations or embeddings.
    """

    pass_: Literal["distill"] = Field("distill", alias="pass")
    student: Student = Student()

    def describe(self) -> str:
        layers = self.student.layers
        if isinstance(layers, tuple):
            who = f"blocks {', '.join(map(str, layers))}"
        elif layers is not None:
            who = f"{layers} blocks"
        else:
            who = self.student.preset or ("another config" if self.student.config else "half the blocks")
        return f"{who}, {self.train.describe()}"

    def student_header(self, header: ModelHeader) -> ModelHeader:
        return header.model_copy(update={"config": header.config | self.student.changes(header)})

    def check(self, header: ModelHeader) -> None:
        for key, value in self.student.config.items():
            if (flaw := kind_flaw(key, value) or size_flaw(key, value, at_the_top=True)) is not None:
                raise invalid(f"`distill`: the student's {flaw}.", "Correct student.config.")
        student = self.student_header(header)
        if header.model_type in SHARED_BLOCKS and self.student.cut:
            raise invalid(
                f"`distill` can't cut a student from a {header.model_type}: its blocks share their weights.",
                "Give the student a `config` or a `preset`.",
            )
        blocks, layers = depth(header), self.student.layers
        if (isinstance(layers, int) and layers > blocks) or (isinstance(layers, tuple) and max(layers) >= blocks):
            raise invalid(
                f"`distill`: student.layers {layers} is out of range; the teacher has {blocks} blocks.",
                f"Blocks are counted from 0 to {blocks - 1}.",
            )
        for key in ("vocab_size", "type_vocab_size"):
            if student.config.get(key) != header.config.get(key):
                raise invalid(
                    f"`distill`: the student's {key} is {student.config.get(key)}, the teacher's {header.config.get(key)}. They must read the same tokens.",
                    f"Leave {key} out of student.config; the student has the teacher's tokenizer.",
                )
        for key in ("num_labels", "id2label", "label2id", "model_type", "architectures"):
            if key in self.student.config:
                raise invalid(
                    f"`distill`: a student can't have another {key} than its teacher.",
                    "Leave it out of student.config.",
                )
        longest = header.config.get("max_position_embeddings")
        if isinstance(longest, int) and int(student.config["max_position_embeddings"]) < self.train.length:
            raise invalid("`distill`: train.length is more than the student's positions.", "Use shorter examples.")
        if header.task == "embedding" and width(student) != width(header):
            raise invalid(
                f"`distill`: the student's vectors would have {width(student)} numbers, the teacher's {width(header)}: they could not be compared.",
                "Leave the width as it is; take fewer blocks or a narrower feed-forward.",
            )
        heads = next((int(student.config[key]) for key in _KEYS["heads"] if key in student.config), 1)
        if width(student) % heads:
            raise invalid(
                f"`distill`: {heads} heads don't divide the student's width of {width(student)}.", "Change one of them."
            )
        if self._parameters(header) >= header.parameters:
            raise invalid(
                "`distill`: the student would be no smaller than its teacher.", "Take fewer blocks or a smaller width."
            )
        super().check(header)

    def _parameters(self, header: ModelHeader) -> float:
        """Return the student's approximate number of parameters: the blocks' from depth and widths, the others' from the width."""
        student = self.student_header(header)
        share = width(student) / max(1, width(header))
        inner = [
            next((float(side.config[key]) for key in _KEYS["inner"] if side.config.get(key)), 4.0 * width(side))
            for side in (student, header)
        ]
        blocks = sum(_count(tensor.shape) for tensor in header.tensors if _in_block(tensor.name))
        outside = header.parameters - blocks
        in_block = (
            depth(student)
            / depth(header)
            * share
            * (4 * width(student) + 2 * inner[0])
            / (4 * width(header) + 2 * inner[1])
        )
        return outside * share + blocks * in_block

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return self.train.cost(header, trained=self._parameters(header) / header.parameters)


class Recover(Teaching):
    """Train a pruned model for a short time, with the job's source model as its teacher. Follows `channels`, `heads`, `layers` or a mask.

    Weights that a mask set to zero stay zero.
    """

    pass_: Literal["recover"] = Field("recover", alias="pass")
    train: Training = Training(epochs=1)
    lora: Lora | None = Field(None, description="Train a low-rank change instead of all weights.")

    def describe(self) -> str:
        return self.train.describe() + (f", LoRA of rank {self.lora.rank}" if self.lora else "")

    def student_header(self, header: ModelHeader) -> ModelHeader:
        return header

    def warnings_behind(self, earlier: Sequence[PassOptions]) -> Iterable[str]:
        if not earlier:
            yield "`recover` comes first, so that the model's teacher is the model itself: put it behind what takes something away."

    def cost(self, header: ModelHeader, calibration: Calibration) -> Cost:
        return self.train.cost(header, trained=0.05 if self.lora else 1.0)


def _key(what: str, header: ModelHeader) -> str:
    return next((key for key in _KEYS[what] if key in header.config), _KEYS[what][0])


def _in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for dim in shape:
        total *= dim
    return total
