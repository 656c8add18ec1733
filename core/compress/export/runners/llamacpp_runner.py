"""Loads model.gguf with llama.cpp on the CPU, through its Python binding."""

import ctypes
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]
import numpy as np

SNIPPET = """\
import llama_cpp

model = llama_cpp.Llama(
    {file!r}, n_ctx={longest}, n_batch={longest}, n_ubatch={longest}, n_threads={threads}, n_threads_batch={threads}, {mode}=True, verbose=False
)
"""


class Words:
    """A language model's logits for whole texts, one after the other: llama.cpp answers a batch no faster."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Any, mask: Any) -> Any:
        return self._run(ids, mask, steps=1)

    def continued(self, ids: Any, mask: Any) -> Any:
        """The same in two steps, the second knowing the first by llama.cpp's cache."""
        return self._run(ids, mask, steps=2)

    def _run(self, ids: Any, mask: Any, *, steps: int) -> Any:
        out = np.zeros((*ids.shape, self.model.n_vocab()), np.float32)
        for row, length in enumerate(mask.sum(axis=1)):
            self.model.reset()
            for part in np.array_split(ids[row, :length], steps):
                self.model.eval(part.tolist())
            out[row, :length] = self.model.scores[:length]
        return out


class Embeddings:
    """An embedder's pooled vectors [B, H]."""

    def __init__(self, model: Any, longest: int) -> None:
        import llama_cpp

        self.model, self.library = model, llama_cpp
        self.batch = llama_cpp.llama_batch_init(longest, 0, 1)

    def __call__(self, ids: Any, mask: Any) -> Any:
        return np.stack([self._embed(row[: one.sum()]) for row, one in zip(ids, mask, strict=True)])

    def _embed(self, tokens: Any) -> Any:
        batch, library = self.batch, self.library
        batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens.tolist()):
            batch.token[at], batch.pos[at] = token, at
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
            batch.logits[at] = True
        library.llama_memory_clear(library.llama_get_memory(self.model.ctx), True)
        status = library.llama_encode(self.model.ctx, batch)
        if status:
            raise RuntimeError(f"llama.cpp could not encode {len(tokens)} tokens: status {status}")
        found = library.llama_get_embeddings_seq(self.model.ctx, 0)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.model.n_embd(),)).copy()


def load(request: dict[str, Any]) -> tuple[Any, dict[str, str], str]:
    embeds = request["task"] == "embedding"
    longest = max(16, request["longest"])
    snippet = SNIPPET.format(
        file=f"{request['folder']}/model.gguf",
        longest=longest,
        threads=request["threads"],
        mode="embedding" if embeds else "logits_all",
    )
    model = measure.execute(snippet)["model"]
    import llama_cpp

    forward = Embeddings(model, longest) if embeds else Words(model)
    return forward, {"llama-cpp-python": llama_cpp.__version__}, snippet


if __name__ == "__main__":
    measure.main(load)
