"""Loads model.gguf with llama.cpp on the CPU, through its Python binding."""

import ctypes
import sys
import time
from collections.abc import Container
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

_ERROR = 4  #: the level of errors in ggml's log
_LISTENING: list[Any] = []  #: keeps callbacks alive that llama.cpp may call while the process runs


class Words:
    """A language model's logits [B, S, V] for whole texts. They run one after the other: llama.cpp is not faster with a batch."""

    def __init__(self, model: Any, longest: int) -> None:
        import llama_cpp

        self.model, self.library = model, llama_cpp
        self.batch = llama_cpp.llama_batch_init(longest, 0, 1)

    def __call__(self, ids: Any, mask: Any) -> Any:
        return self._run(ids, mask, steps=1)

    def continued(self, ids: Any, mask: Any) -> Any:
        """The same logits in two steps. The second step gets the first half of the text only through llama.cpp's cache."""
        return self._run(ids, mask, steps=2)

    def _run(self, ids: Any, mask: Any, *, steps: int) -> Any:
        out = np.zeros((*ids.shape, self.model.n_vocab()), np.float32)
        for row, length in enumerate(mask.sum(axis=1)):
            self.model.reset()
            for part in np.array_split(ids[row, :length], steps):
                self.model.eval(part.tolist())
            out[row, :length] = self.model.scores[:length]
        return out

    def waits(self, ids: Any, tokens: int, _cached: bool) -> tuple[list[float], Any]:
        """Decode greedily, exactly `tokens` tokens for each prompt, one prompt after the other.

        Returns the milliseconds before each token, summed over the prompts, and the tokens [B, tokens].
        """
        written = [self._write(row, tokens) for row in ids]
        return np.sum([took for took, _ in written], axis=0).tolist(), np.array([text for _, text in written])

    def _write(self, prompt: Any, tokens: int) -> tuple[list[float], list[int]]:
        library, context = self.library, self.model.ctx
        library.llama_memory_clear(library.llama_get_memory(context), True)
        took: list[float] = []
        text: list[int] = []
        step, seen = prompt.tolist(), 0
        while len(text) < tokens:
            start = time.perf_counter()
            fill(self.batch, step, seen, answers={len(step) - 1})
            status = library.llama_decode(context, self.batch)
            if status:
                raise RuntimeError(f"llama.cpp could not decode token {seen}: status {status}")
            logits = library.llama_get_logits_ith(context, -1)
            text.append(int(np.ctypeslib.as_array(logits, (self.model.n_vocab(),)).argmax()))
            took.append(1000 * (time.perf_counter() - start))
            step, seen = text[-1:], seen + len(step)
        return took, text


def fill(batch: Any, tokens: list[int], seen: int, *, answers: Container[int]) -> None:
    """Put tokens into a llama.cpp batch of one text, after `seen` earlier tokens. answers: indices at which outputs are computed."""
    batch.n_tokens = len(tokens)
    for at, token in enumerate(tokens):
        batch.token[at], batch.pos[at] = token, seen + at
        batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        batch.logits[at] = at in answers


class Embeddings:
    """An embedding model's pooled vectors [B, H]."""

    def __init__(self, model: Any, longest: int) -> None:
        import llama_cpp

        self.model, self.library = model, llama_cpp
        llama_cpp.llama_set_embeddings(model.ctx, True)  # version 0.3.36 of the binding loses its `embedding=True`
        self.batch = llama_cpp.llama_batch_init(longest, 0, 1)

    def __call__(self, ids: Any, mask: Any) -> Any:
        return np.stack([self._embed(row[: mask_row.sum()]) for row, mask_row in zip(ids, mask, strict=True)])

    def _embed(self, tokens: Any) -> Any:
        batch, library = self.batch, self.library
        fill(batch, tokens.tolist(), 0, answers=range(len(tokens)))
        library.llama_memory_clear(library.llama_get_memory(self.model.ctx), True)
        status = library.llama_encode(self.model.ctx, batch)
        if status:
            raise RuntimeError(f"llama.cpp could not encode {len(tokens)} tokens: status {status}")
        found = library.llama_get_embeddings_seq(self.model.ctx, 0)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.model.n_embd(),)).copy()


def _load(snippet: str) -> Any:
    """Load the model. Raises RuntimeError with llama.cpp's log: without `verbose` the binding does not say why a file can't be loaded."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, _data: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode(errors="replace").strip())

    errors: list[str] = []
    _LISTENING.append(listen)
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    try:
        return measure.execute(snippet)["model"]
    except ValueError as error:
        raise RuntimeError("; ".join(errors) or str(error)) from error


def load(request: dict[str, Any]) -> tuple[Any, ...]:
    embeds = request["task"] == "embedding"
    longest = max(16, request["longest"])
    snippet = SNIPPET.format(
        file=f"{request['folder']}/model.gguf",
        longest=longest,
        threads=request["threads"],
        mode="embedding" if embeds else "logits_all",
    )
    model = _load(snippet)
    import llama_cpp

    versions = {"llama-cpp-python": llama_cpp.__version__}
    if embeds:
        return Embeddings(model, longest), versions, snippet
    words = Words(model, longest)
    return words, versions, snippet, None, words.waits


if __name__ == "__main__":
    measure.main(load)
