"""Reads a model's depth and width from its config, whose keys depend on the family."""

from nightpress.core.recipes.header import ModelHeader

_DEPTH = ("num_hidden_layers", "n_layers", "n_layer")
_WIDTH = ("hidden_size", "dim", "n_embd")


def depth(header: ModelHeader) -> int:
    """Return the number of blocks; 0 if the config has no such key."""
    return _first(header, _DEPTH)


def width(header: ModelHeader) -> int:
    """Return the width of the hidden states; 0 if the config has no such key."""
    return _first(header, _WIDTH)


def _first(header: ModelHeader, keys: tuple[str, ...]) -> int:
    return next((int(header.config[key]) for key in keys if isinstance(header.config.get(key), int)), 0)


def evenly(count: int, of: int) -> tuple[int, ...]:
    """Return `count` of `of` blocks, evenly spread, with the first and the last: (3, 6) → (0, 2, 5). With a count of 1, the first."""
    if count == 1:
        return (0,)
    return tuple((at * (of - 1)) // (count - 1) for at in range(count))


def ends_of_spans(count: int, of: int) -> tuple[int, ...]:
    """Return the last block of each of `count` equal spans of the depth: (3, 6) → (1, 3, 5)."""
    return tuple((at + 1) * of // count - 1 for at in range(count))
