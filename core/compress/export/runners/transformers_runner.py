"""Loads a model folder with transformers, in fp32 on the CPU."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import measure  # type: ignore[import-not-found]

SNIPPET = """\
import torch
from transformers import {auto_class}

torch.set_num_threads({threads})
model = {auto_class}.from_pretrained({folder!r}, dtype=torch.float32)
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
    snippet = SNIPPET.format(auto_class=_CLASSES[task], threads=request["threads"], folder=request["folder"])
    model = measure.execute(snippet)["model"]
    import torch
    import transformers

    output = "last_hidden_state" if task == "embedding" else "logits"
    # A cache of keys and values serves the next token; here all tokens are there at once.
    extra = {"use_cache": False} if task in {"causal-lm", "seq2seq"} else {}

    def forward(ids: Any, mask: Any) -> Any:
        if ids.ndim == 4:
            inputs = {"pixel_values": torch.from_numpy(ids)}
        else:
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if task == "seq2seq":  # told to write the text that it reads
            inputs["labels"] = inputs["input_ids"]
        with torch.inference_mode():
            out = model(**inputs, **extra)
        return getattr(out, output).float().numpy()

    ends = getattr(model.config, "eos_token_id", None)
    ends = set(ends) if isinstance(ends, list) else {ends}

    def generate(ids: Any, new_tokens: int) -> list[int]:
        """Greedy, whatever the model's own generation settings say."""
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

    return forward, {"torch": torch.__version__, "transformers": transformers.__version__}, snippet, generate


if __name__ == "__main__":
    measure.main(load)
