"""Loads a model folder with transformers, in fp32 on the CPU."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]

SNIPPET = """\
import torch
from transformers import {auto_class}

torch.set_num_threads({threads})
model = {auto_class}.from_pretrained({folder!r}, dtype=torch.float32{own_code})
model.eval()
"""

_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "embedding": "AutoModel",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}


def load(request: dict[str, Any]) -> tuple[Any, ...]:
    task = request["task"]
    # A source with such a file is refused. An artifact may have it: Nightpress wrote it.
    own = ", trust_remote_code=True" if Path(request["folder"], "custom_generate", "generate.py").is_file() else ""
    snippet = SNIPPET.format(
        auto_class=_CLASSES[task], threads=request["threads"], folder=request["folder"], own_code=own
    )
    model = measure.execute(snippet)["model"]
    import torch
    import transformers

    output = "last_hidden_state" if task == "embedding" else "logits"
    # A key/value cache only helps to decode further tokens. Here, all tokens are given at once.
    extra = {"use_cache": False} if task in {"causal-lm", "seq2seq"} else {}

    def forward(ids: Any, mask: Any) -> Any:
        if ids.ndim == 4:
            inputs = {"pixel_values": torch.from_numpy(ids)}
        else:
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if task == "seq2seq":  # the decoder gets the encoder's text
            inputs["labels"] = inputs["input_ids"]
        with torch.inference_mode():
            out = model(**inputs, **extra)
        return getattr(out, output).float().numpy()

    ends = getattr(model.config, "eos_token_id", None)
    ends = set(ends) if isinstance(ends, list) else {ends}

    def generate(ids: Any, new_tokens: int) -> list[int]:
        """Continue a prompt [S] greedily, even if the model's own generation settings say otherwise."""
        step, cache, written = torch.from_numpy(ids)[None], None, []
        with torch.inference_mode():
            for _ in range(new_tokens):
                out = model(input_ids=step, past_key_values=cache, use_cache=True)
                cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
                written.append(token)
                if token in ends:
                    break
                step = torch.tensor([[token]])
        return written

    def waits(ids: Any, tokens: int, cached: bool) -> tuple[list[float], Any]:
        """Decode by the folder's generation settings, but greedily and exactly `tokens` tokens. A stored prefix cache is dropped first.

        cached False: no key/value cache, so each token reads the whole text again.
        """
        prompt, clock = torch.from_numpy(ids), _Clock(len(ids))
        model.__dict__.pop("_prefix_store", None)
        plain = {} if cached else {"use_cache": False, "cache_implementation": None}
        text = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
            streamer=clock,
            **plain,
        )
        return clock.waits[:tokens], text[:, ids.shape[1] :].numpy()

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return forward, versions, snippet, generate, waits


class _Clock:
    """A streamer that measures the wait before each token in milliseconds. Tokens that arrive together (drafts) share the wait equally."""

    def __init__(self, batch: int) -> None:
        self.waits: list[float] = []
        self._batch, self._last, self._begun = batch, time.perf_counter(), False

    def put(self, tokens: Any) -> None:
        if not self._begun:  # the first call has the prompt
            self._begun = True
            return
        now = time.perf_counter()
        count = tokens.numel() // self._batch
        self.waits += [1000 * (now - self._last) / count] * count
        self._last = now

    def end(self) -> None:
        """Part of the streamer's interface. Does nothing."""


if __name__ == "__main__":
    measure.main(load)
