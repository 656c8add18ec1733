"""The option `within`: a gate for which a pass finds the smallest result itself."""

import math
from typing import Annotated

from pydantic import AfterValidator, Field

from nightpress.core.recipes.gates import Gate, parse_gate, read_gate
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes.base import PassOptions

#: Figures of the finished artifact alone: a pass can't measure them.
_OF_ARTIFACTS = frozenset(
    {"size", "latency", "throughput", "prefill_tokens_per_s", "decode_tokens_per_s", "memory"},
)


def _checked(text: str | None) -> str | None:
    if text is None:
        return None
    gate = parse_gate(*read_gate(text))
    if gate.metric in _OF_ARTIFACTS:
        raise ValueError(f"{gate.metric} is no figure of quality: name one such as 'accuracy >= -1%'")
    return str(gate)


class Searching(PassOptions):
    """A pass that can search for the smallest result that keeps a gate."""

    within: Annotated[str | None, AfterValidator(_checked)] = Field(
        None,
        exclude_if=lambda value: value is None,  # workers of earlier versions refuse a field that they don't know
        description="A gate such as `accuracy >= -1%`: the pass finds the smallest result that keeps it, measured on one half of the evaluation's data; the report's figures come from the other half. The unfavourable end of the figure's interval decides, as in `gates`.",
    )

    @property
    def gate_within(self) -> Gate | None:
        return None if self.within is None else parse_gate(*read_gate(self.within))

    def most_results(self, header: ModelHeader) -> int:
        """Return how many results the search chooses from, at most."""
        raise NotImplementedError

    def tries(self, header: ModelHeader) -> int:
        return 0 if self.within is None else 1 + math.ceil(math.log2(max(2, self.most_results(header))))
