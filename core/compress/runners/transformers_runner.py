"""Loads a model folder with transformers: in fp32 on the CPU, or in its own number type on a GPU."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import encoder_decoder  # type: ignore[import-not-found]
import measure  # type: ignore[import-not-found]

SNIPPET = """\
import torch
from transformers import {auto_class}

torch.set_num_threads({threads})
model = {auto_class}.from_pretrained({folder!r}, dtype=torch.float32{own_code})
model.eval()
"""

#: `device_map` loads each weight straight to its device. A plain model without compressed weights could also use `.to("cuda")`.
GPU_SNIPPET = """\
import torch
from transformers import {auto_class}

model = {auto_class}.from_pretrained({folder!r}, dtype="auto", device_map={device_map!r}{own_code})
model.eval()
"""

#: For fp4 weights with rounded inputs: transformers leaves them packed, and the first call would unpack them to bfloat16 for every model.
UNPACK = """
model.hf_quantizer.compressor.decompress_model(model)
torch.nn.Module.to(model, model.dtype)
"""

_FILLED = 0.9  #: share of a GPU's free memory that weights may take; the rest is for what the model computes
_SCORED_ROWS = 512  #: positions whose logits are in float32 at a time


def load(request: dict[str, Any]) -> tuple[Any, ...]:
    task = request["task"]
    # A source with such a file is refused. An artifact may have it: Nightpress wrote it.
    own = ", trust_remote_code=True" if Path(request["folder"], "custom_generate", "generate.py").is_file() else ""
    given = {"auto_class": request["model_class"], "folder": request["folder"], "own_code": own}
    on_gpu = request["device"] == "cuda"
    if on_gpu:
        snippet = GPU_SNIPPET.format(**given, device_map=_device_map(request["folder"]))
    else:
        snippet = SNIPPET.format(**given, threads=request["threads"])
    if rounds_fp4_inputs(request["folder"]):
        snippet += UNPACK
    model = measure.execute(snippet)["model"]
    import torch
    import transformers

    forward = (OnGpu if on_gpu else OnCpu)(model, task, request["prefix"])
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    generate = partial(_generate_for, forward) if task == "seq2seq" else partial(_generate, model)
    return forward, versions, snippet, generate, partial(_waits, forward)


def rounds_fp4_inputs(folder: str) -> bool:
    """Whether the folder holds fp4 weights whose inputs a runtime rounds: to fp4, or to fp8."""
    stored = json.loads(Path(folder, "config.json").read_bytes()).get("quantization_config") or {}
    groups = (stored.get("config_groups") or {}).values()
    return any(
        group.get("input_activations") is not None
        and (group["weights"]["num_bits"], group["weights"]["type"]) == (4, "float")
        for group in groups
    )


def _device_map(folder: str) -> str:
    """`cuda`, or `auto` if the GPU doesn't hold the weights. Then accelerate leaves the rest of them in the host's memory."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    weights = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return "cuda" if weights < _FILLED * free else "auto"


class OnCpu:
    """The model's first output for whole texts, as float32 arrays."""

    def __init__(self, model: Any, task: str, prefix: Sequence[int] = ()) -> None:
        """prefix: the first tokens of an encoder-decoder's decoder."""
        self.model, self._task, self.prefix = model, task, list(prefix)
        self._output = "last_hidden_state" if task == "embedding" else "logits"
        # A key/value cache only helps to decode further tokens. Here, all tokens are given at once.
        self._extra = {"use_cache": False} if task in {"causal-lm", "seq2seq"} else {}
        self.loaded_as: dict[str, Any] = {"device": "cpu", "dtype": str(model.dtype).removeprefix("torch.")}

    def __call__(self, ids: Any, mask: Any, types: Any = None, decoder: Any = None) -> Any:
        return self._run(ids, mask, types, decoder).float().cpu().numpy()

    def probed(self, name: str, factor: float = 1.0) -> Any:
        """A linear layer's answers to `measure.probe_vectors` at `measure.probe_rows`, without its bias. None if there is no such layer.

        factor: the vectors are multiplied by it, and the answers divided, so that the layer's own scale of its inputs holds them.
        """
        import torch

        layer = self._layer(name)
        if layer is None:
            return None
        vectors = factor * torch.from_numpy(measure.probe_vectors(layer.in_features))
        given = vectors.to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            answered = layer(given).float()
            if layer.bias is not None:
                answered = answered - layer.bias.float()
            answered = answered / factor
        return answered[:, torch.from_numpy(measure.probe_rows(answered.shape[1])).to(answered.device)].cpu().numpy()

    def _layer(self, name: str) -> Any:
        """The linear layer of this name, with or without the prefix that a model with a head has. None if there is none."""
        import torch

        for known in (name, name.partition(".")[2]):
            try:
                layer = self.model.get_submodule(known)
            except AttributeError:
                continue
            if isinstance(layer, torch.nn.Linear):
                return layer
        return None

    def _run(self, ids: Any, mask: Any, types: Any = None, decoder: Any = None) -> Any:
        """The output as a tensor on the model's device. ids, mask, types, decoder: as `measure` has them."""
        import torch

        place = self.model.device
        if ids.ndim > 2:
            name = "pixel_values" if ids.ndim == 4 else "input_features"
            inputs = {name: torch.from_numpy(ids).to(place, self.model.dtype)}
        else:
            inputs = {"input_ids": torch.from_numpy(ids).to(place), "attention_mask": torch.from_numpy(mask).to(place)}
        if types is not None:
            inputs["token_type_ids"] = torch.from_numpy(types).to(place)
        if self._task == "seq2seq":
            read = encoder_decoder.decoder_text(ids, self.prefix) if decoder is None else decoder
            inputs["decoder_input_ids"] = torch.from_numpy(read).to(place)
        with torch.inference_mode():
            return getattr(self.model(**inputs, **self._extra), self._output)


class OnGpu(OnCpu):
    """The same on a GPU. What is kept of the logits is computed there: to copy them all would take longer than the forward pass."""

    def __init__(self, model: Any, task: str, prefix: Sequence[int] = ()) -> None:
        super().__init__(model, task, prefix)
        import torch

        places = set((getattr(model, "hf_device_map", None) or {}).values())
        self.loaded_as |= {
            "device": "cuda",
            "name": torch.cuda.get_device_name(),
            "dispatched": bool(places & {"cpu", "disk"}),
        }

    @property
    def peak_gpu(self) -> int:
        """Peak of the GPU's memory that torch took, in bytes."""
        import torch

        return int(torch.cuda.max_memory_reserved())

    def timed(self, ids: Any, mask: Any) -> None:
        """Run, and wait for the GPU. Nothing is copied back."""
        import torch

        self._run(ids, mask)
        torch.cuda.synchronize()

    def scored(self, ids: Any, mask: Any, targets: Any, compared: Any, decoder: Any = None) -> dict[str, Any]:
        """As `measure._score`."""
        import torch

        logits = self._run(ids, mask, None, decoder)
        wanted = torch.from_numpy(targets).to(logits.device)
        chosen, right = logits[wanted >= 0], wanted[wanted >= 0]
        nll = []
        parts = torch.split(chosen, _SCORED_ROWS), torch.split(right, _SCORED_ROWS)
        for rows, expected in zip(*parts, strict=True):
            known = rows.float().log_softmax(dim=-1)
            nll.append(-known.gather(1, expected[:, None])[:, 0].double().cpu())
        at = torch.from_numpy(compared).to(logits.device)
        return {
            "nll": torch.cat(nll).numpy() if nll else torch.zeros(0).double().numpy(),
            "top1": chosen.argmax(dim=-1).cpu().numpy(),
            "logp": logits[at].float().log_softmax(dim=-1).cpu().numpy(),
        }

    def chosen(self, ids: Any, mask: Any, decoder: Any = None) -> Any:
        """The most likely token at each position, [B, S]."""
        return self._run(ids, mask, None, decoder).argmax(dim=-1).cpu().numpy()


def _generate(model: Any, ids: Any, new_tokens: int) -> list[int]:
    """Continue a prompt [S] greedily, even if the model's own generation settings say otherwise."""
    import torch

    prompt = torch.from_numpy(ids)[None].to(model.device)
    with torch.inference_mode():
        steps = _greedy_steps(prompt, lambda step, cache: model(input_ids=step, past_key_values=cache, use_cache=True))
        return _until_end(steps, new_tokens, getattr(model.config, "eos_token_id", None))


def _generate_for(forward: OnCpu, given: Any, new_tokens: int) -> list[int]:
    """What an encoder-decoder writes greedily for one text [S], or one sound [bands, frames]."""
    import torch

    model = forward.model
    ends = getattr(model.generation_config, "eos_token_id", None) or getattr(model.config, "eos_token_id", None)
    with torch.inference_mode():
        return _until_end(_steps_of_pair(forward, torch.from_numpy(given)[None].to(model.device)), new_tokens, ends)


def _steps_of_pair(forward: OnCpu, given: Any) -> Iterator[Any]:
    """What an encoder-decoder writes for texts [B, S] or sounds [B, bands, frames], as `_greedy_steps`."""
    import torch

    model = forward.model
    heard = model.get_encoder()(given if given.ndim == 2 else given.to(model.dtype), return_dict=True)

    def read(step: Any, cache: Any) -> Any:
        return model(encoder_outputs=heard, decoder_input_ids=step, past_key_values=cache, use_cache=True)

    return _greedy_steps(torch.tensor([forward.prefix] * len(given), device=model.device), read)


def _greedy_steps(step: Any, read: Callable[[Any, Any], Any]) -> Iterator[Any]:
    """Yield the most likely next tokens [B, 1], without an end. read: (further tokens [B, T], cache) → the model's output."""
    cache = None
    while True:
        out = read(step, cache)
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        yield step


def _until_end(steps: Iterator[Any], new_tokens: int, ends: int | list[int] | None) -> list[int]:
    """The tokens of one text, at most `new_tokens` of them: up to the first of `ends`, which is the last."""
    stops = set(ends) if isinstance(ends, list) else {ends}
    written: list[int] = []
    for step in islice(steps, new_tokens):
        written.append(int(step))
        if written[-1] in stops:
            break
    return written


def _waits(forward: OnCpu, ids: Any, tokens: int, cached: bool) -> tuple[list[float], Any]:
    """Decode by the folder's generation settings, but greedily and exactly `tokens` tokens. A stored prefix cache is dropped first.

    cached False: no key/value cache, so each token reads the whole text again.
    """
    import torch

    model = forward.model
    prompt, clock = torch.from_numpy(ids).to(model.device), _Clock(len(ids))
    if forward.prefix:
        return _waits_of_pair(forward, prompt, tokens)
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
    return clock.waits[:tokens], text[:, ids.shape[1] :].cpu().numpy()


def _waits_of_pair(forward: OnCpu, given: Any, tokens: int) -> tuple[list[float], Any]:
    """The same for an encoder-decoder. The first wait has the encoder in it. Its own `generate` may demand further settings, e.g. a language."""
    import torch

    waits, written, last = [], [], time.perf_counter()
    with torch.inference_mode():
        for step in islice(_steps_of_pair(forward, given), tokens):
            written.append(step.cpu())
            now = time.perf_counter()
            waits.append(1000 * (now - last))
            last = now
    return waits, torch.cat(written, dim=1).numpy()


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
