"""Fields by which a model's JSON has transformers fetch or run code that came from elsewhere."""

from typing import Any


def code_flaw(key: str, value: Any) -> str | None:  # noqa: ARG001
    """Why a field is refused, as the end of a sentence about its file; None: it is not."""
    return "has an `auto_map`: the model wants to run code of its own" if key == "auto_map" else None
