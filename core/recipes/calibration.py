"""The options of the calibration text."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

#: `builtin:prose`, `builtin:code`, or the id or name of a data set of the user.
DataRef = Annotated[str, Field(pattern=r"^(builtin:[a-z]+|[A-Za-z0-9][A-Za-z0-9._-]{0,127})$")]
PROSE, CODE = "builtin:prose", "builtin:code"
BUILTIN_DATA = frozenset({PROSE, CODE})
MIXTURE = "builtin:mixture"  #: prose, code, chats and the model's own texts; for the calibration alone
#: What recipes without `calibration` get. `bench.low_bits --calibrations` compares it with prose.
DEFAULT = MIXTURE
SLICES = "builtin:slices"  #: prose, code and chats, each a slice of its own; for the evaluation alone


def readable(ref: str) -> str:
    """Return the name of a data set that passes read. Raises ValueError for one that only measures."""
    if ref == SLICES:
        raise ValueError(f"`{SLICES}` only measures: no model learns from it, or is calibrated on it")
    return ref


ReadRef = Annotated[DataRef, AfterValidator(readable)]


class Calibration(BaseModel):
    """The text that passes may use.

    The built-in data sets have separate text for the evaluation. For other data, the plan warns if the evaluation reads the same data set.
    The default, `builtin:mixture`, is for a language model equal shares of prose, code, chats in its own template and texts that it writes
    itself. Other models get the prose. `calibration: auto` stands for the defaults.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True, defer_build=True)

    data: ReadRef = DEFAULT
    samples: int = Field(128, ge=1, le=100_000)
    length: int = Field(512, ge=8, le=131_072, description="Tokens of each sample.")
    packing: bool = Field(
        True,
        description="Join the texts and cut them into windows of `length` tokens. false: each text is a sample of its own, cut or padded to `length`; statistics leave out the padding.",
    )
    seed: int = Field(0, ge=0, description="Which texts are taken: 0 from the start on, another from elsewhere.")
    dtype: Literal["auto", "float32"] = Field(
        "auto",
        description="Number type of the forward passes, while passes work block by block. auto: bfloat16 on processors with instructions for it, float32 on others, and on a GPU as the weights are stored. float32: takes up to twice as long and leaves the same on all processors but for the order of sums.",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, raw: object) -> object:
        if raw == "auto":
            return {}
        if isinstance(raw, dict) and raw.get("packing") is False:  # the mixture is running text
            return {"data": PROSE, **raw}
        return raw

    @model_validator(mode="after")
    def _mixture_is_packed(self) -> Self:
        if self.data == MIXTURE and not self.packing:
            raise ValueError(f"`{MIXTURE}` is running text: leave `packing` at true")
        return self
