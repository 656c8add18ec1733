"""Loads a folder with mlx-lm, in the number type that is stored: on Apple's GPUs where there is one, else on the processor."""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]
import numpy as np

# On a processor, MLX would start a C++ compiler for functions that it fuses. A worker need not have one.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

SNIPPET = """\
from pathlib import Path

from mlx_lm.utils import load_model

model, _ = load_model(Path({folder!r}))
"""


class Words:
    """A language model's logits [B, S, V] for whole texts, padded on the right."""

    def __init__(self, model: Any) -> None:
        import mlx.core as mx
        from mlx.utils import tree_flatten

        self.model, self.mx = model, mx
        parameters: Any = tree_flatten(model.parameters())
        floats = [values.dtype for _, values in parameters if mx.issubdtype(values.dtype, mx.floating)]
        device = "cpu" if mx.default_device().type == mx.DeviceType.cpu else "gpu"
        self.loaded_as = {"device": device, "dtype": str(floats[0]).rpartition(".")[2]}

    def __call__(self, ids: Any, _mask: Any) -> Any:
        return self._array(self.model(self.mx.array(ids)))

    def continued(self, ids: Any, _mask: Any) -> Any:
        """The same logits in two steps. The second step gets the first half of the texts only through the cache."""
        cache = self._cache()
        parts = [part for part in np.array_split(ids, 2, axis=1) if part.shape[1]]
        return np.concatenate([self._array(self.model(self.mx.array(part), cache=cache)) for part in parts], axis=1)

    def waits(self, ids: Any, tokens: int, _cached: bool) -> tuple[list[float], Any]:
        """Decode greedily, exactly `tokens` tokens for each prompt. Returns the milliseconds before each token, and the tokens [B, tokens]."""
        cache, step = self._cache(), self.mx.array(ids)
        took, text = [], []
        for _ in range(tokens):
            start = time.perf_counter()
            step = self.model(step, cache=cache)[:, -1:].argmax(axis=-1)
            self.mx.eval(step)
            took.append(1000 * (time.perf_counter() - start))
            text.append(np.array(step)[:, 0])
        return took, np.stack(text, axis=1)

    def probed(self, name: str, factor: float = 1.0) -> Any:
        """A linear layer's answers to `measure.probe_vectors` at `measure.probe_rows`, without its bias. None if there is no such layer."""
        from mlx.nn.layers.quantized import QuantizedLinear

        layer = self.model
        try:
            for part in name.split("."):
                layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
        except (AttributeError, IndexError, KeyError, TypeError):
            return None
        if not isinstance(layer, QuantizedLinear):
            return None
        columns = layer.scales.shape[1] * layer.group_size
        vectors = self.mx.array(measure.probe_vectors(columns) * factor).astype(layer.scales.dtype)
        answers = layer(vectors) - layer.get("bias", 0)
        return self._array(answers)[:, measure.probe_rows(answers.shape[1])] / factor

    def _cache(self) -> Any:
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.model)

    def _array(self, values: Any) -> Any:
        return np.array(values.astype(self.mx.float32))


def load(request: dict[str, Any]) -> tuple[Any, ...]:
    snippet = SNIPPET.format(folder=request["folder"])
    words = Words(measure.execute(snippet)["model"])
    return words, {"mlx": version("mlx"), "mlx-lm": version("mlx-lm")}, snippet, None, words.waits


if __name__ == "__main__":
    measure.main(load)
