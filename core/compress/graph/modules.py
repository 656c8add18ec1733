"""What is traced: a model as modules with positional inputs, each with the names and the shapes of its inputs and outputs.

An encoder-decoder is two modules, its encoder and its decoder with a cache; every other model is one.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nightpress.core.compress.data.tokenized import Sequences
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.recipes.exceptions import OTHER_STATES
from nightpress.core.recipes.header import ModelHeader

#: The names of dimensions that vary. Generation libraries look for these names: transformers.js makes an empty cache from them.
_BATCH, _LENGTH = "batch_size", "sequence_length"
_BOTH = {0: _BATCH, 1: _LENGTH}
_SEEN = {0: _BATCH, 1: "total_sequence_length"}
_PAST = {0: _BATCH, 2: "past_sequence_length"}
_HEARD = {0: _BATCH, 1: "encoder_sequence_length"}
_HEARD_PAST = {0: _BATCH, 2: "past_encoder_sequence_length"}

#: The graphs of an encoder-decoder, and the one graph of any other model. The names are those of optimum and of transformers.js.
MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model_merged"


@dataclass(frozen=True)
class Signature:
    """A graph's inputs and outputs: their names, example inputs, and the dimensions that vary."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: tuple[Any, ...]
    varying: tuple[Any, ...]


class Whole(nn.Module):
    """A model that is one graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def parts(self, header: ModelHeader, check: Sequences) -> Mapping[str, tuple[nn.Module, Signature]]:
        """The modules to trace, each by the name of its graph. check: the examples of `answer`."""
        return {MODEL: (self, self.signature(header, check))}

    def signature(self, header: ModelHeader, check: Sequences) -> Signature:
        raise NotImplementedError

    def answer(self, check: Sequences) -> Tensor:
        """The model's own first output for whole examples, computed without a cache."""
        raise NotImplementedError


class FirstOutput(Whole):
    """A model that reads text, with one output: its logits, or its last hidden state."""

    def __init__(self, model: nn.Module, output: str, *, types: bool) -> None:
        super().__init__(model)
        self.output, self.types = output, types

    def answer(self, check: Sequences) -> Tensor:
        types = None if check.types is None else torch.from_numpy(check.types)
        out: Tensor = self(torch.from_numpy(check.ids), torch.from_numpy(check.mask), types)
        return out

    def signature(self, header: ModelHeader, _check: Sequences) -> Signature:
        return encoder_signature(example_ids(header), types=self.types, outputs=[self.output])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        extra = {"token_type_ids": token_type_ids} if token_type_ids is not None else {}
        result = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **extra)
        out: Tensor = getattr(result, self.output)
        return out


class Sees(Whole):
    """A model that sees images, with one output: its logits, or its last hidden state."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__(model)
        self.output = output

    def answer(self, check: Sequences) -> Tensor:
        out: Tensor = self(torch.from_numpy(check.ids))
        return out

    def signature(self, _header: ModelHeader, check: Sequences) -> Signature:
        images = torch.from_numpy(np.resize(check.ids, (2, *check.ids.shape[1:])))
        return Signature(("pixel_values",), (self.output,), (images,), ({0: _BATCH},))

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = getattr(self.model(pixel_values=pixel_values, return_dict=True), self.output)
        return out


class WithCache(Whole):
    """A decoder that reads its key/value cache as tensors and returns the extended cache: one graph reads a prompt and generates.

    The tensors have the names that generation libraries look for: `past_key_values.0.key` [B, heads, past, width] is read and
    `present.0.key` is returned.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        with torch.inference_mode():
            cache = getattr(model(input_ids=torch.full((1, 2), 5), use_cache=True), "past_key_values", None)
        pairs = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in getattr(cache, "layers", ())
        ]
        states = [kept for pair in pairs for kept in pair if kept is not None]
        if not pairs or len(states) < 2 * len(pairs):
            raise NightpressError(
                ErrorCode.UNSUPPORTED_ARCHITECTURE,
                f"A {type(model).__name__} can't be traced into a graph with a cache: {OTHER_STATES}.",
                hint="Leave onnx and openvino out of `exports`.",
            )
        self.shapes = [(kept.shape[1], kept.shape[3]) for kept in states]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **({"position_ids": position_ids} if self._takes_positions else {}),
        )
        present = [states for layer in out.past_key_values.layers for states in (layer.keys, layer.values)]
        return (out.logits, *present)

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def answer(self, check: Sequences) -> Tensor:
        ids, mask = torch.from_numpy(check.ids), torch.from_numpy(check.mask)
        out: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return out

    def signature(self, header: ModelHeader, _check: Sequences) -> Signature:
        ids = example_ids(header)
        batch, length, past = *ids.shape, 3
        cache = [torch.zeros(batch, heads, past, width) for heads, width in self.shapes]
        layers = [f"{at}.{part}" for at in range(len(cache) // 2) for part in ("key", "value")]
        positions = torch.arange(past, past + length).expand(batch, length).contiguous()
        return Signature(
            ("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{layer}" for layer in layers)),
            ("logits", *(f"present.{layer}" for layer in layers)),
            (ids, torch.ones(batch, past + length, dtype=torch.int64), positions, cache),
            (dict(_BOTH), dict(_SEEN), dict(_BOTH), [dict(_PAST) for _ in cache]),
        )


class EncoderDecoder(Whole):
    """An encoder-decoder: its encoder, and its decoder that reads and returns a cache."""

    def __init__(self, model: nn.Module, header: ModelHeader) -> None:
        super().__init__(model)
        self._hears = header.hears

    def parts(self, header: ModelHeader, _check: Sequences) -> Mapping[str, tuple[nn.Module, Signature]]:
        encoder = _Encoder(self.model, hears=self._hears).eval()
        given = encoder.example(header)
        with torch.inference_mode():
            hidden = encoder(*given).clone()
        mask = None if self._hears else given[1]
        decoder = _Decoder(self.model).eval()
        return {
            ENCODER: (encoder, encoder.signature(given)),
            DECODER: (decoder, decoder.signature(example_ids(header)[:, :7], mask, hidden)),
        }

    def answer(self, check: Sequences) -> Tensor:
        """The logits of every decoder's token, [N, T, V]."""
        assert check.decoder is not None
        given = torch.from_numpy(check.ids)
        inputs = (
            {"input_features": given}
            if self._hears
            else {"input_ids": given, "attention_mask": torch.from_numpy(check.mask)}
        )
        decoder = torch.from_numpy(check.decoder)
        out: Tensor = self.model(**inputs, decoder_input_ids=decoder, use_cache=False).logits
        return out


class _Encoder(nn.Module):
    def __init__(self, model: Any, *, hears: bool) -> None:
        super().__init__()
        self.model, self._hears = model, hears

    def forward(self, given: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        inputs = {"input_features": given} if self._hears else {"input_ids": given, "attention_mask": attention_mask}
        out: Tensor = self.model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        return out

    def example(self, header: ModelHeader) -> tuple[Tensor, ...]:
        if self._hears:
            return (torch.randn(2, *header.features, generator=torch.Generator().manual_seed(0)),)
        ids = example_ids(header)
        return ids, torch.ones_like(ids)

    def signature(self, given: tuple[Tensor, ...]) -> Signature:
        if self._hears:
            return Signature(("input_features",), ("last_hidden_state",), given, ({0: _BATCH},))
        read = {0: _BATCH, 1: "encoder_sequence_length"}
        return Signature(("input_ids", "attention_mask"), ("last_hidden_state",), given, (dict(read), dict(read)))


class _Decoder(nn.Module):
    """A decoder that reads its caches as tensors: one graph makes the first token and each further one.

    `past_key_values.0.decoder.key` [B, heads, past, width] is the cache of its own tokens, `past_key_values.0.encoder.key` that of the
    encoder's answer. The second is empty at the first call, and whole at each further one. So the graph projects only the part of
    `encoder_hidden_states` [B, S, H] behind what is cached: all of it, then nothing. No branch is needed, and no second copy of the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        encoder_attention_mask: Tensor | None,
        encoder_hidden_states: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        own = DynamicCache(list(zip(past[::4], past[1::4], strict=True)))
        heard = DynamicCache(list(zip(past[2::4], past[3::4], strict=True)))
        cache = EncoderDecoderCache(own, heard)
        cache.is_updated = dict.fromkeys(cache.is_updated, False)  # what is new is always added
        new = encoder_hidden_states[:, past[2].shape[2] :]
        masked = {}
        if (
            encoder_attention_mask is not None
        ):  # in four dimensions, for the mask is of the whole text and not of what is new
            hidden = 1.0 - encoder_attention_mask[:, None, None, :].to(torch.float32)
            masked["attention_mask"] = hidden * torch.finfo(torch.float32).min
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=new),
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **masked,
        )
        layers = zip(own.layers, heard.layers, strict=True)
        present = [kept for a, b in layers for kept in (a.keys, a.values, b.keys, b.values)]
        return (out.logits, *present)

    def signature(self, ids: Tensor, mask: Tensor | None, hidden: Tensor) -> Signature:
        from transformers.modeling_outputs import BaseModelOutput

        heard = BaseModelOutput(last_hidden_state=hidden)  # not all classes take a tuple
        with torch.inference_mode():
            out = self.model(encoder_outputs=heard, attention_mask=mask, decoder_input_ids=ids, use_cache=True)
        found = out.past_key_values
        layers = zip(found.self_attention_cache.layers, found.cross_attention_cache.layers, strict=True)
        caches = [kept for a, b in layers for kept in (a.keys, a.values, b.keys, b.values)]
        past = [
            torch.zeros(len(ids), kept.shape[1], 3 if at % 4 < 2 else 5, kept.shape[3])
            for at, kept in enumerate(caches)
        ]
        names = [
            f"{at}.{part}.{kind}"
            for at in range(len(past) // 4)
            for part in ("decoder", "encoder")
            for kind in ("key", "value")
        ]
        masked = mask is not None
        return Signature(
            (
                "input_ids",
                *(["encoder_attention_mask"] if masked else []),
                "encoder_hidden_states",
                *(f"past_key_values.{name}" for name in names),
            ),
            ("logits", *(f"present.{name}" for name in names)),
            (ids, mask, hidden, past),
            (
                dict(_BOTH),
                dict(_HEARD) if masked else None,
                dict(_HEARD),
                [dict(_PAST if at % 4 < 2 else _HEARD_PAST) for at in range(len(past))],
            ),
        )


def takes_types(model: Any, header: ModelHeader) -> bool:
    """Whether a model reads token types and has more than one type."""
    asks = "token_type_ids" in inspect.signature(model.forward).parameters
    return asks and int(header.config.get("type_vocab_size") or 0) > 1


def example_ids(header: ModelHeader) -> Tensor:
    """Token ids of two example texts for tracing: int64 [2, 16]."""
    return torch.arange(5, 5 + 32).reshape(2, 16) % max(header.vocabulary or 64, 6)


def encoder_signature(ids: Tensor, *, types: bool, outputs: list[str]) -> Signature:
    """The signature of a module that reads ids, mask and, with `types`, token types. Batch and length vary."""
    example = (ids, torch.ones_like(ids)) + ((torch.zeros_like(ids),) if types else ())
    names = ("input_ids", "attention_mask", "token_type_ids")[: len(example)]
    return Signature(names, tuple(outputs), example, tuple(dict(_BOTH) for _ in names))
