"""Key/value caches for `model.generate` that transformers has not: a sliding window with sinks, rounded keys and values, reused beginnings.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs)

Nightpress writes this file into a model's folder as custom_generate/generate.py, where transformers looks for it; what it does stands in
the folder's generation_config.json under `cache_config`. It needs torch and transformers and nothing else.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

_GROUP = 32  #: tokens that share a key channel's range, channels that share a token's


def generate(inputs: Any = None, *, model: Any, **given: Any) -> Any:
    """`model.generate`, with the cache that the folder's generation_config.json asks for.

    Raises ValueError for prompts of different lengths in one batch where a sliding window would lose their padding.
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
    """An empty cache for `model`, as the settings say."""
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
    """Memory of what a cache holds."""
    held = [tensor for layer in cache.layers for value in vars(layer).values() for tensor in _tensors(value)]
    return sum(tensor.nbytes for tensor in held)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.dim() > 1 else []
    return [tensor for tensor in value if isinstance(tensor, Tensor)] if isinstance(value, list) else []


class SlidingLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """The first `sinks` tokens and the last `window` ones (StreamingLLM, arXiv 2309.17453, section 3.2).

    There, positions are those within the cache. A rotary product depends on the distance of two positions alone, so the text's own positions
    serve, if the sinks' keys are turned on by as many places as have been dropped behind them.
    """

    is_croppable = False
    keys: Tensor
    values: Tensor

    def __init__(self, sinks: int, window: int, turns: Tensor) -> None:
        """turns: the rotations' frequencies [rotated / 2]."""
        super().__init__()
        self.sinks, self.window, self.seen = sinks, window, 0
        self._turns = turns

    @property
    def _kept(self) -> int:
        return min(self.seen, self.sinks + self.window)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in keys and values [B, H, S, D]; give back those that these tokens see, themselves included."""
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
        """Keys as they would be `places` further on (RoFormer, arXiv 2104.09864, eq. 34, its pairs half a width apart)."""
        angle = (places * self._turns.to(keys.device, torch.float64)).repeat(2)
        cos, sin = angle.cos().to(keys.dtype), angle.sin().to(keys.dtype)
        turning, rest = keys[..., : len(angle)], keys[..., len(angle) :]
        first, second = turning.chunk(2, dim=-1)
        return torch.cat([turning * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that there will be, and the position that the first of them stands for."""
        return self._kept + query_length, self.seen - self._kept

    def get_seq_length(self) -> int:
        """Tokens seen, which is the next one's position."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what was dropped can't come back."""
        del tokens_to_remove
        raise ValueError("a sliding cache can't be cut back, which assisted decoding would need")

    def reset(self) -> None:
        super().reset()
        self.seen = 0


class QuantizedLayer(DynamicLayer):  # type: ignore[misc]
    """All but the newest tokens rounded to `bits`: keys by channel over 32 tokens, values by token over 32 channels (KIVI, arXiv 2402.02750).

    What is rounded once stays as it is; nothing is rounded again. Newest tokens, `residual` of them at least, stay as they are.
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
        """Take in keys and values [B, H, S, D]; give back all there are."""
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
        """Tokens seen."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: a group of tokens is rounded together."""
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
    """(codes uint8, step float16, lowest float16): each run along `dim` on a grid of 2^bits from its lowest to its highest value.

    8 / bits codes share a byte, neighbours along `dim` as far apart as its length divided by that.
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
    """The numbers on the grid, float32."""
    parts = [(codes >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.cat(parts, dim=dim).float().mul_(step).add_(low)


class PrefixStore:
    """Keys and values of texts that were run before, for those that begin like them; at most `limit` bytes of them.

    Where there is no room, the least frequently used go first, and of those the longest unused.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._entries: list[_Entry] = []
        self._clock = 0

    def take(self, tokens: Tensor) -> tuple[DynamicCache, int]:
        """tokens [S] → a cache of the longest beginning that is known, all but the last token at most, and its length."""
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
            # A dynamic layer grows by making a new tensor: this view of the stored one is never written to.
            cache.update(keys[:, :, :length], values[:, :, :length], layer)
        return cache, length

    def put(self, tokens: Tensor, cache: DynamicCache) -> bool:
        """Keep the cache of these tokens [S]. False: there is no room, or they are known."""
        for entry in list(self._entries):
            common = _common(entry.tokens, tokens)
            if common == len(tokens):
                return False
            if common == len(entry.tokens):  # this text goes on where that one ended
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
    """One text: its tokens [S], keys and values [1, H, S, D] of each layer, and how often and when it was used."""

    def __init__(self, tokens: Tensor, states: list[tuple[Tensor, Tensor]], uses: int) -> None:
        self.tokens, self.states, self.uses, self.last = tokens, states, uses, 0
        self.bytes = tokens.nbytes + sum(tensor.nbytes for pair in states for tensor in pair)


def _common(first: Tensor, second: Tensor) -> int:
    """Tokens that two texts begin with alike."""
    shorter = min(len(first), len(second))
    differ = (first[:shorter] != second[:shorter]).nonzero()
    return int(differ[0]) if len(differ) else shorter
