"""Key/value caches for `model.generate` that transformers lacks: a sliding window with sinks, quantized keys and values, reused prefixes.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs)

Nightpress writes this file into a model's folder as custom_generate/generate.py, where transformers looks for it. The settings are under
`cache_config` in the folder's generation_config.json. The file needs only torch and transformers.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_GROUP = 32  #: tokens that share the range of a key channel, and channels of a value that share the range of a token


def generate(inputs: Any = None, *, model: Any, **given: Any) -> Any:
    """Call `model.generate` with the cache that the folder's generation_config.json describes.

    Raises ValueError for padded prompts with a sliding window: the window would lose the padding.
    """
    own = type(model).generate
    ids = inputs if given.get("input_ids") is None else given["input_ids"]
    settings = model.generation_config.cache_config
    if given.get("past_key_values") is not None or given.get("use_cache") is False or ids is None:
        return own(model, inputs, **given)
    mask = given.get("attention_mask")
    padded = mask is not None and not bool((torch.as_tensor(mask) != 0).all())
    if settings["mode"] == "sliding" and padded:
        raise ValueError("a sliding cache takes prompts of one length: generate from them one by one")
    if "prefix_bytes" in settings:
        if len(ids) != 1 or padded:
            return own(model, inputs, **given)
        store = model.__dict__.setdefault("_prefix_store", PrefixStore(settings["prefix_bytes"]))
        cache, _ = store.take(ids[0])
        out = own(model, inputs, past_key_values=cache, **_without_cache(given))
        written = out if isinstance(out, Tensor) else out.sequences
        if len(written) == 1:
            store.put(written[0, : cache.get_seq_length()], cache)
        return out
    return own(model, inputs, past_key_values=cache_for(model, settings), **_without_cache(given))


def _without_cache(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "past_key_values"}


def cache_for(model: Any, settings: dict[str, Any]) -> Cache:
    """An empty sliding or quantized cache for `model`, by the settings."""
    layers: list[DynamicLayer]
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if settings["mode"] == "sliding":
        turns = next(
            module.inv_freq for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)
        )
        layers = [SlidingLayer(settings["sinks"], settings["window"], turns) for _ in range(count)]
    else:
        layers = [QuantizedLayer(settings["bits"], settings["residual"]) for _ in range(count)]
    return Cache(layers=layers)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors in a cache."""
    held = [tensor for layer in cache.layers for value in vars(layer).values() for tensor in _tensors(value)]
    return sum(tensor.nbytes for tensor in held)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.dim() > 1 else []
    return [tensor for tensor in value if isinstance(tensor, Tensor)] if isinstance(value, list) else []


class SlidingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """The first `sinks` tokens and the last `window` ones (StreamingLLM, arXiv 2309.17453, section 3.2).

    The paper counts positions within the cache. A product of rotary embeddings depends only on the distance of two positions. So this layer
    keeps the positions of the text, and rotates the sinks' keys forward by the number of dropped tokens.
    """

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self, sinks: int, window: int, turns: Tensor) -> None:
        """turns: the frequencies of the rotary embeddings [rotated / 2]."""
        super().__init__()
        self.sinks, self.window, self.seen = sinks, window, 0
        self._turns = turns

    @property
    def _kept(self) -> int:
        return min(self.seen, self.sinks + self.window)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, H, S, D]. Returns all keys and values that these tokens attend to, their own included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        dropped = self.seen - self._kept
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.seen += key_states.shape[-2]
        self.keys, self.values = self._cut(keys), self._cut(values)
        if dropped and self.sinks:
            keys = torch.cat([self._turned(keys[:, :, : self.sinks], dropped), keys[:, :, self.sinks :]], dim=-2)
        return keys, values

    def _cut(self, states: Tensor) -> Tensor:
        if states.shape[-2] <= self.sinks + self.window:
            return states
        return torch.cat([states[:, :, : self.sinks], states[:, :, -self.window :]], dim=-2)

    def _turned(self, keys: Tensor, places: int) -> Tensor:
        """Rotate keys to positions `places` later (RoFormer, arXiv 2104.09864, eq. 34; the numbers of a pair are half a width apart)."""
        angle = (places * self._turns.to(keys.device, torch.float64)).repeat(2)
        cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
        turning, rest = keys[..., : len(angle)], keys[..., len(angle) :]
        first, second = turning.chunk(2, dim=-1)
        return torch.cat([turning * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of keys after the next update, and the position of the first key."""
        return self._kept + query_length, self.seen - self._kept

    def get_seq_length(self) -> int:
        """The number of tokens seen, which is the position of the next token."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: dropped tokens can't be restored."""
        del tokens_to_remove
        raise ValueError("a sliding cache can't be cut back, which assisted decoding would need")

    def reset(self) -> None:
        super().reset()
        self.seen = 0


class QuantizedLayer(DynamicLayer):  # type: ignore[misc]
    """Quantizes all but the newest tokens to `bits`: keys per channel over 32 tokens, values per token over 32 channels.

    KIVI, arXiv 2402.02750. Each token is quantized once. At least the newest `residual` tokens stay in full precision.
    """

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self, bits: int, residual: int) -> None:
        super().__init__()
        self.bits, self.residual, self.seen = bits, residual, 0
        #: codes, steps and lowest values of keys [B, H, groups, 32 · bits / 8 or 1, D], then of values [B, H, S, groups, …]
        self.packed: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, H, S, D]. Returns all keys and values, the older ones dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        keys, values = self.keys, self.values
        if self.packed:
            keys = torch.cat([self._keys().to(self.dtype), keys], dim=-2)
            values = torch.cat([self._values().to(self.dtype), values], dim=-2)
        ready = (self.keys.shape[-2] - self.residual) // _GROUP * _GROUP
        if ready > 0:
            self._pack(self.keys[:, :, :ready], self.values[:, :, :ready])
            self.keys, self.values = self.keys[:, :, ready:].clone(), self.values[:, :, ready:].clone()
        return keys, values

    def _pack(self, keys: Tensor, values: Tensor) -> None:
        channels = math.gcd(_GROUP, values.shape[-1])
        parts = [
            *pack(torch.unflatten(keys, -2, (-1, _GROUP)), self.bits, dim=-2),
            *pack(torch.unflatten(values, -1, (-1, channels)), self.bits, dim=-1),
        ]
        self.packed = (
            [torch.cat([old, new], dim=2) for old, new in zip(self.packed, parts, strict=True)]
            if self.packed
            else parts
        )

    def _keys(self) -> Tensor:
        return unpack(*self.packed[:3], bits=self.bits, dim=-2).flatten(2, 3)

    def _values(self) -> Tensor:
        return unpack(*self.packed[3:], bits=self.bits, dim=-1).flatten(3, 4)

    def get_seq_length(self) -> int:
        """The number of tokens seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: the tokens of a group are quantized together, so that single ones can't be removed."""
        del tokens_to_remove
        raise ValueError("a quantized cache can't be cut back, which assisted decoding would need")

    def reset(self) -> None:
        super().reset()
        self.seen, self.packed = 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices, ...])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.packed = [change(tensor) for tensor in self.packed]


def pack(states: Tensor, bits: int, *, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each run along `dim` to a grid of 2^bits values, from its lowest to its highest value.

    Returns (codes uint8, step float16, lowest value float16). `dim` is cut into 8 / bits equal parts, and a byte holds one code of each
    part.
    """
    low = states.amin(dim, keepdim=True).float()
    step = ((states.amax(dim, keepdim=True).float() - low) / (2**bits - 1)).half()
    low = low.half()
    divisor = step.float().clamp_min(torch.finfo(torch.float16).tiny)
    codes = ((states.float() - low.float()) / divisor).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    packed = torch.zeros_like(codes.chunk(8 // bits, dim)[0])
    for place, part in enumerate(codes.chunk(8 // bits, dim)):
        packed |= part << (place * bits)
    return packed, step, low


def unpack(codes: Tensor, step: Tensor, low: Tensor, *, bits: int, dim: int) -> Tensor:
    """Dequantize the codes of `pack` to float32."""
    parts = [(codes >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.cat(parts, dim=dim).float().mul_(step).add_(low)


class PrefixStore:
    """Keys and values of earlier texts, for later texts with the same beginning: at most `limit` bytes.

    If there is no room, the least frequently used entry is dropped; among equals, the least recently used.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._entries: list[_Entry] = []
        self._clock = 0

    def take(self, tokens: Tensor) -> tuple[DynamicCache, int]:
        """A cache for the longest known prefix of tokens [S], and the prefix's length. The last token is never part of it."""
        best, length = None, 0
        for entry in self._entries:
            common = _common(entry.tokens, tokens)
            if common > length:
                best, length = entry, common
        length = min(length, len(tokens) - 1)
        cache = DynamicCache()
        if best is None or length <= 0:
            return cache, 0
        self._touch(best)
        for layer, (keys, values) in enumerate(best.states):
            # A dynamic layer grows by making a new tensor, so it never writes to this view of the stored tensor.
            cache.update(keys[:, :, :length], values[:, :, :length], layer)
        return cache, length

    def put(self, tokens: Tensor, cache: DynamicCache) -> bool:
        """Store the cache of these tokens [S]. Returns False if there is no room, or if the tokens are known."""
        for entry in list(self._entries):
            common = _common(entry.tokens, tokens)
            if common == len(tokens):
                return False
            if common == len(entry.tokens):  # this text continues the stored one
                self._drop(entry)
                return self._add(tokens, cache, entry.uses)
        return self._add(tokens, cache, 0)

    def __len__(self) -> int:
        return len(self._entries)

    def _add(self, tokens: Tensor, cache: DynamicCache, uses: int) -> bool:
        states = [(layer.keys, layer.values) for layer in cache.layers]
        entry = _Entry(tokens.clone(), states, uses)
        if entry.bytes > self.limit:
            return False
        while self.used + entry.bytes > self.limit:
            self._drop(min(self._entries, key=lambda entry: (entry.uses, entry.last)))
        self._entries.append(entry)
        self.used += entry.bytes
        self._touch(entry)
        return True

    def _touch(self, entry: "_Entry") -> None:
        self._clock += 1
        entry.uses, entry.last = entry.uses + 1, self._clock

    def _drop(self, entry: "_Entry") -> None:
        self._entries = [kept for kept in self._entries if kept is not entry]
        self.used -= entry.bytes


class _Entry:
    """A stored text: its tokens [S], keys and values [1, H, S, D] of each layer, the number of its uses, and the time of the last."""

    def __init__(self, tokens: Tensor, states: list[tuple[Tensor, Tensor]], uses: int) -> None:
        self.tokens, self.states, self.uses, self.last = tokens, states, uses, 0
        self.bytes = tokens.nbytes + sum(tensor.nbytes for pair in states for tensor in pair)


def _common(first: Tensor, second: Tensor) -> int:
    """The length of the common prefix of two texts, in tokens."""
    shorter = min(len(first), len(second))
    differ = (first[:shorter] != second[:shorter]).nonzero()
    return int(differ[0]) if len(differ) else shorter
