"""Loads a model folder with vLLM, in vLLM's own environment, and serves several requests at a time.

vLLM's engine runs in this process, not in one of its own, so that its memory is this process's. No request leaves the machine.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]
import numpy as np

#: ONEDNN_MAX_CPU_ISA → the tests of the processor, in torch.cpu, that must fail. vLLM chooses its kernels by these, not by the variable.
_NO_AMX = ("_is_amx_tile_supported", "_is_amx_fp16_supported")
_AVX512_ALONE = (*_NO_AMX, "_is_avx512_bf16_supported")
_AVX2 = (*_AVX512_ALONE, "_is_avx512_supported", "_is_vnni_supported")
_HELD_DOWN = {
    **dict.fromkeys(("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), _AVX2),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), _AVX512_ALONE),
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16"), _NO_AMX),
}

#: On a processor, `enforce_eager`: compiling takes minutes, and needs a compiler. On a GPU vLLM compiles and captures as it does when it serves.
SNIPPET = """\
import vllm

model = vllm.LLM(
    model={folder!r},
    max_model_len={longest},
    kv_cache_memory_bytes={cache_bytes},
    enable_prefix_caching=False,
    {device}
)
"""


def load(request: dict[str, Any]) -> tuple[Any, ...]:
    import torch

    for name in _HELD_DOWN.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), ()):
        setattr(torch.cpu, name, lambda: False)
    on_gpu = request["device"] == "cuda"
    if on_gpu:  # what must be free when vLLM starts, and no more: its cache has a size, and others share the GPU
        free, total = torch.cuda.mem_get_info()
        device = f"gpu_memory_utilization={int(50 * free / total) / 100},"
    else:
        device = "enforce_eager=True,"
    given = {key: request[key] for key in ("folder", "longest", "cache_bytes")}
    snippet = SNIPPET.format(**given, device=device)
    model = measure.execute(snippet)["model"]
    import vllm

    return Serving(model, on_gpu=on_gpu), {"torch": torch.__version__, "vllm": vllm.__version__}, snippet


class Serving:
    """A language model in vLLM's engine. Prompts are token ids, and texts are continued greedily."""

    def __init__(self, model: Any, *, on_gpu: bool) -> None:
        import torch
        import vllm

        self._model, self._requests, self.wrote = model, 0, ""
        self._greedy = partial(vllm.SamplingParams, temperature=0.0, ignore_eos=True)
        dtype = str(model.llm_engine.model_config.dtype).removeprefix("torch.")
        self.loaded_as: dict[str, Any] = {"device": "cuda" if on_gpu else "cpu", "dtype": dtype}
        if on_gpu:
            self.loaded_as["name"] = torch.cuda.get_device_name()

    @property
    def peak_gpu(self) -> int | None:
        """Peak of the GPU's memory that torch took, in bytes; None on a processor."""
        import torch

        return int(torch.cuda.max_memory_reserved()) if self.loaded_as["device"] == "cuda" else None

    def written(self, ids: Any, mask: Any, tokens: int) -> dict[str, Any]:
        """Continue prompts [B, S] by `tokens` tokens.

        Returns `nll` [B, S + tokens − 1], the negative log-probability of each token after the first, 0 where a row's mask ends early, and
        `tokens` [B, tokens].
        """
        rows = [row[:length].tolist() for row, length in zip(ids, mask.sum(axis=1), strict=True)]
        settings = self._greedy(max_tokens=tokens, logprobs=0, prompt_logprobs=0)
        outputs = self._model.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
        nll = np.zeros((len(rows), ids.shape[1] + tokens - 1))
        written = np.zeros((len(rows), tokens), np.int64)
        for at, (row, output) in enumerate(zip(rows, outputs, strict=True)):
            written[at] = output.outputs[0].token_ids
            places = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            known = [*row[1:], *written[at].tolist()]
            nll[at, : len(known)] = [-place[token].logprob for place, token in zip(places, known, strict=True)]
        self.wrote = outputs[0].outputs[0].text
        return {"nll": nll, "tokens": written}

    def served(self, prompts: Any, tokens: int) -> dict[str, Any]:
        """Serve all prompts [requests, S] at once, `tokens` tokens each.

        Returns the milliseconds until all were done, until each request's first token [requests], and between its tokens [requests][tokens − 1].
        """
        engine, settings = self._model.llm_engine, self._greedy(max_tokens=tokens, detokenize=False)
        names = [str(self._requests + at) for at in range(len(prompts))]
        self._requests += len(prompts)
        began = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt.tolist()}, settings)
        seen: dict[str, list[float]] = {name: [] for name in names}
        while engine.has_unfinished_requests():
            for output in engine.step():
                told = seen[output.request_id]
                fresh = len(output.outputs[0].token_ids) - len(told)
                told += [1000 * (time.perf_counter() - began)] * fresh
        return {
            "milliseconds": max(times[-1] for times in seen.values()),
            "first": [times[0] for times in seen.values()],
            "between": [np.diff(times).tolist() for times in seen.values()],
        }


if __name__ == "__main__":
    measure.main(load)
