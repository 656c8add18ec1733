"""What a student learns from its teacher: the parts of a distillation's loss, each with its options."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Blocks = Annotated[tuple[Annotated[int, Field(ge=0, le=999)], ...], Field(min_length=1, max_length=1000)]


class Part(BaseModel):
    """Options inside the options of a pass."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True, defer_build=True)


class Logits(Part):
    """Learn the teacher's distribution (Hinton et al., arXiv 1503.02531): α·T²·KL(teacher ‖ student at temperature T) + (1−α)·cross-entropy with the labels."""

    temperature: float = Field(2.0, gt=0, le=100)
    alpha: float = Field(
        1.0, ge=0, le=1, description="Weight of the teacher's answers in the loss. With 1, no labels are needed."
    )
    weight: float = Field(1.0, gt=0, le=1e6)
    cache: bool = Field(
        False,
        description="Run the teacher once over all examples and keep its answers. Not possible where words are masked anew at each step.",
    )
    cache_top: int = Field(
        64, ge=1, le=4096, description="Number of the most likely tokens that are kept for each position."
    )
    cache_bytes: int = Field(
        4 * 1024**3, ge=1, description="Largest size of the kept answers. The job fails before it writes more."
    )


class Hidden(Part):
    """Learn the hidden states after the teacher's blocks, by mean squared error (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351).

    If the widths differ, a learned projection maps the student's hidden states to the teacher's width.
    """

    layers: Blocks | None = Field(
        None,
        description="For each block of the student, the block of the teacher that it learns from. Default: evenly spread; the last learns from the last.",
    )
    weight: float = Field(1.0, gt=0, le=1e6)


class Relations(Part):
    """Learn the relations between the teacher's queries, keys and values (MiniLMv2, arXiv 2012.15828). Heads and widths may differ."""

    layer: int = Field(-1, description="The teacher's block; −1: the last. The student's last block learns from it.")
    heads: int = Field(12, ge=1, le=256, description="Number of parts into which vectors are split.")
    weight: float = Field(1.0, gt=0, le=1e6)


class Cosine(Part):
    """Learn the direction of the teacher's pooled vector: 1 − cosine. For embedders."""

    weight: float = Field(1.0, gt=0, le=1e6)


class Lora(Part):
    """Learn a low-rank change of each linear layer. It is merged into the layer at the end (arXiv 2106.09685)."""

    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0, le=1e6, description="The change is scaled by alpha / rank.")
