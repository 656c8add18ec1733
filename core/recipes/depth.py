"""What configs of the known families call a model's depth and widths."""

from nightpress.core.recipes.header import ModelHeader

_DEPTH = ("num_hidden_layers", "n_layers", "n_layer")
_WIDTH = ("hidden_size", "dim", "n_embd")


def depth(header: ModelHeader) -> int:
    """How many blocks the model has; 0 if its config doesn't say."""
    return _first(header, _DEPTH)


def width(header: ModelHeader) -> int:
    """The width of its hidden states; 0 if its config doesn't say."""
    return _first(header, _WIDTH)


def _first(header: ModelHeader, keys: tuple[str, ...]) -> int:
    return next((int(header.config[key]) for key in keys if isinstance(header.config.get(key), int)), 0)


def evenly(count: int, of: int) -> tuple[int, ...]:
    """`count` of `of` blocks, evenly spread, the first and the last among them: (3, 6) → (0, 2, 5)."""
    if count == 1:
        return (0,)
    return tuple((at * (of - 1)) // (count - 1) for at in range(count))


def ends_of_spans(count: int, of: int) -> tuple[int, ...]:
    """The blocks behind which equal shares of the depth are done: (3, 6) → (1, 3, 5)."""
    return tuple((at + 1) * of // count - 1 for at in range(count))
