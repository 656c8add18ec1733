"""The options for a share of zeros and their pattern N:M."""

from typing import Annotated

from pydantic import Field

from nightpress.core.numbers import whole_number
from nightpress.core.recipes.linears import Divisor

Pattern = Annotated[str, Field(pattern=r"^(unstructured|[1-9]\d?:[1-9]\d?)$")]


def with_sparsity(raw: object) -> object:
    """Set `sparsity` to 1 − N/M if the options have a pattern N:M. Raises ValueError if they name another sparsity."""
    if not isinstance(raw, dict) or ":" not in str(raw.get("pattern", "")):
        return raw
    kept, of = (whole_number(part) for part in (str(raw["pattern"]).partition(":")[::2]))
    if kept is None or of is None or not 0 < kept < of:
        raise ValueError(f"pattern {str(raw['pattern'])[:40]}: the first number must be smaller than the second")
    given = 1 - kept / of
    if raw.get("sparsity") is not None and raw["sparsity"] != given:
        raise ValueError(f"pattern {raw['pattern']} gives sparsity {given:g}; leave `sparsity` out")
    return {**raw, "sparsity": given}


def pattern_divisor(pattern: str) -> Divisor | None:
    """Return M for a pattern N:M, which must divide a layer's number of inputs; None if the pattern is unstructured."""
    return None if pattern == "unstructured" else Divisor(int(pattern.split(":")[1]), "pattern")
