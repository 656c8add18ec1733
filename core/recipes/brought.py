"""What a model was stored as when it was brought, if it was not stored as plain floats."""

from pydantic import BaseModel, ConfigDict


class Brought(BaseModel):
    """The stored form of a quantized source. A header with it describes the floats that the codes stand for."""

    model_config = ConfigDict(frozen=True)

    method: str  #: `quant_method` of its config, e.g. "gptq"
    detail: str  #: e.g. "gptq, int4, groups of 128"
    weights: int  #: number of weights stored as codes; 0: config.json says so, and all weights are floats
    size: int  #: bytes of all stored tensors
