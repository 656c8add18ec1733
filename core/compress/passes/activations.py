"""Passes that also quantize activations: SmoothQuant, fp8, and the scales of a key/value cache."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nightpress.core.compress.context import PassContext
from nightpress.core.compress.executors.blocks import FinalTensor, Inputs, Statistic
from nightpress.core.compress.executors.live_block import LiveBlock, group_of
from nightpress.core.compress.executors.watch import without_padding
from nightpress.core.compress.grids.stored import from_tensors, grid_of, round_weight
from nightpress.core.compress.model.checkpoint import write_file
from nightpress.core.compress.model.quantization_config import CACHE_FILE
from nightpress.core.compress.numerical_failures import check_finite
from nightpress.core.compress.passes.blockwise import made_up, press, quantize, record, scheme_of, settle_all_coded
from nightpress.core.compress.passes.folding import BlockFold, Folding, FoldTarget
from nightpress.core.compress.passes.quantize import stream_rounded
from nightpress.core.compress.passes.registry import folder_pass
from nightpress.core.compress.passes.stacks import share_rows, sharing
from nightpress.core.compress.ranks.group import ALONE, Group
from nightpress.core.compress.solvers.gptq import round_obs
from nightpress.core.compress.solvers.obs import factorize
from nightpress.core.compress.solvers.smooth import (
    Rounded,
    SmoothLayer,
    Strengths,
    input_scale,
    search_factors,
    smoothing_factors,
)
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.report import PassRecord
from nightpress.core.recipes.header import ModelHeader
from nightpress.core.recipes.passes import Fp8, KvCache, SmoothQuant
from nightpress.core.recipes.passes.activations import CACHED_FROM


@folder_pass(SmoothQuant)
def smoothquant(source: Path, target: Path, options: SmoothQuant, context: PassContext) -> PassRecord:
    """Quantize weights and inputs to int8 with SmoothQuant. `target` becomes a compressed-tensors `int-quantized` model."""
    method = RoundedInputs(options, context.header)
    summary = {"alpha": options.alpha, "activations": options.activations, "weights": options.weights}
    return quantize(source, target, method, options.scheme, options, context, summary)


@folder_pass(Fp8)
def fp8(source: Path, target: Path, options: Fp8, context: PassContext) -> PassRecord:
    """Quantize weights to fp8, and write how a runtime rounds inputs. `target` becomes a compressed-tensors `float-quantized` model."""
    summary = {"weights": options.weights, "activations": options.activations}
    if options.activations == "dynamic":
        return stream_rounded(source, target, options, context, summary)
    method = RoundedInputs(options, context.header)
    return quantize(source, target, method, options.scheme, options, context, summary)


class RoundedInputs:
    """Weights and inputs on a grid of 8 bits. For SmoothQuant, factors first move magnitude from the inputs into the weights."""

    by_group = (
        False  # The layer before a weight changes too, and it has already run when the weight's inputs are known.
    )

    def __init__(self, options: SmoothQuant | Fp8, header: ModelHeader) -> None:
        self._schemes, self._grid = options.scheme, grid_of(options.scheme(""))
        self._smooth = options if isinstance(options, SmoothQuant) else None
        self._folding = Folding(header)

    def watch(self, columns: int, device: torch.device) -> Strengths:
        return Strengths(columns, device, gram=self._smooth is not None and self._smooth.weights == "gptq")

    def settle(self, block: LiveBlock, inputs: Sequence[Inputs], device: torch.device) -> dict[str, FinalTensor]:
        seen = {name: group for group in inputs for name in group.names}
        places = [] if self._smooth is None else self._folding.places(block, seen)
        floats = {name: block[name].to(device).float() for name in seen}
        factors = {} if self._smooth is None else self._even_out(self._smooth, places, block, floats)
        settled = {
            name: made_up(name, weight, block[name].dtype) for name, weight in floats.items() if name not in seen
        }
        for group in inputs:
            given = factors.get(group.names[0], torch.ones((), device=device))
            settled |= self._round(group, given, {name: floats.pop(name) for name in group.names}, block)
        return settled

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        return from_tensors(name, scheme_of(self._schemes, name), written)

    def _even_out(
        self,
        options: SmoothQuant,
        places: Sequence[BlockFold],
        block: LiveBlock,
        floats: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        for place in places:
            holders = block.group if place.spans(block) else ALONE
            if options.alpha == "search":
                parts = place.parts_of(block) if place.spans(block) else place.parts
                layers = [self._layer(part, floats) for part in parts]
                group = ALONE if place.spans(block) else group_of(block, place.targets[0])
                found = search_factors(layers, self._grid, share=place.share, group=group, holders=holders)
                del layers
            elif not any(self._inputs_of(name) for name in place.targets):
                continue  # smoothing gains nothing where inputs stay in float
            else:
                largest = torch.stack([_strengths(part.statistic).largest for part in place.parts]).amax(0)
                heaviest = torch.stack([floats[name].abs().amax(0) for name in place.targets]).amax(0, keepdim=True)
                holders.largest(largest)
                holders.largest(heaviest)
                found = smoothing_factors(largest, heaviest, options.alpha, share=place.share)
            place.apply(found, block, floats)
            factors |= dict.fromkeys(place.targets, found)
        return factors

    def _round(
        self, inputs: Inputs, factors: Tensor, weights: Mapping[str, Tensor], block: Mapping[str, Tensor]
    ) -> dict[str, FinalTensor]:
        strengths = _strengths(inputs.statistic)
        settled: dict[str, FinalTensor] = {}
        group = sharing(weights.values(), group_of(block, inputs.names[0]))
        factor = gram = None
        if strengths.gram is not None and self._smooth is not None:
            gram = strengths.gram.matrix() / factors / factors.view(-1, 1)
            factor = factorize(gram, damping=self._smooth.damping, by_power=True, group=group)
        for name, weight in weights.items():
            stored, scheme = block[name].dtype, scheme_of(self._schemes, name)
            scales = {}
            if self._inputs_of(name) == "static":
                scales[name] = input_scale(strengths.largest / factors, self._grid).to(stored)
            if factor is not None and gram is not None:
                own, rows = share_rows(weight, group), {name: len(weight)}
                coded = round_obs(own, gram, factor, scheme, stored)
                settled |= settle_all_coded({name: (coded, own)}, scheme, input_scales=scales, rows=rows, group=group)
            else:
                largest = float(weight.abs().max()) if scheme.strategy == "tensor" else None
                coded = round_weight(weight, scheme, stored, largest=largest)
                settled |= settle_all_coded({name: (coded, weight)}, scheme, input_scales=scales)
        return settled

    def _inputs_of(self, name: str) -> Rounded:
        """Return how the inputs of this weight are rounded; None: they stay in float."""
        activations = scheme_of(self._schemes, name).activations
        return None if activations is None else "static" if activations.static else "token"

    def _layer(self, part: FoldTarget, floats: Mapping[str, Tensor]) -> SmoothLayer:
        strengths = _strengths(part.statistic)
        stacked = torch.cat([floats[name] for name in part.names])
        inputs = self._inputs_of(part.names[0])
        return SmoothLayer(stacked, strengths.sample(), strengths.largest, inputs, part.share * strengths.tokens)


def _strengths(statistic: Statistic) -> Strengths:
    assert isinstance(statistic, Strengths)
    return statistic


@folder_pass(KvCache)
def kv_cache(source: Path, target: Path, options: KvCache, context: PassContext) -> PassRecord:
    """Find the scales of cached keys and values. `target` becomes the same model with these scales beside each attention's weights."""
    start = time.monotonic()
    method = CacheScales(options)
    pressed = press(source, target, method, options, context, cache=method.cache)
    write_file(target / CACHE_FILE, json.dumps(options.cache_arguments()).encode())
    return record(
        options, context, pressed, start, {"format": options.format, "scales": "one a layer for keys, one for values"}
    )


class CacheScales:
    """Scales from the largest key and the largest value of each layer, measured where a runtime would cache them."""

    by_group = False

    def __init__(self, options: KvCache) -> None:
        self._grid = grid_of(options.scheme())
        self.cache = _SeenByCache()

    def watch(self, columns: int, device: torch.device) -> Statistic:
        del columns, device
        raise AssertionError("no weight is chosen")

    def settle(
        self, block: Mapping[str, Tensor], inputs: Sequence[Inputs], device: torch.device
    ) -> dict[str, FinalTensor]:
        del inputs, device
        weight = next((name for name in block if name.endswith(CACHED_FROM)), None)
        if weight is None:
            return {}  # a block without attention
        largest = self.cache.take()
        attention, stored = weight.rsplit(".", 2)[0], block[weight].dtype
        for peaks in largest.values():
            check_finite([attention], peaks)
        scales = {
            f"{attention}.{part}_scale": input_scale(peaks.float().view(1), self._grid).to(stored)
            for part, peaks in largest.items()
        }
        return {weight: FinalTensor(weight=block[weight], tensors={weight: block[weight], **scales}, effect=None)}

    def restore(self, name: str, written: Mapping[str, Tensor]) -> Tensor:
        del name, written
        raise AssertionError("no weight is chosen")


class _OtherStatesError(NightpressError, AttributeError):
    """A block asks a cache for something else than keys and values. An AttributeError, so that `hasattr` answers False."""


class _SeenByCache:
    """Replaces a model's key/value cache. It records the largest magnitude of keys and of values, and returns both unchanged."""

    def __init__(self) -> None:
        self.real: Tensor | None = None
        self._largest: dict[str, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record and return keys and values, [B, heads, L, width] each."""
        for part, states in (("k", keys), ("v", values)):
            largest = without_padding(states.transpose(1, 2).flatten(2), self.real).abs().amax()
            self._largest[part] = torch.maximum(self._largest[part], largest) if part in self._largest else largest
        return keys, values

    def sees(self, names: Iterable[str]) -> bool:
        return any(name.endswith(CACHED_FROM) for name in names)

    def combine(self, group: Group) -> None:
        """Replace the largest magnitudes by those of all processes."""
        for largest in self._largest.values():
            group.largest(largest)

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise _OtherStatesError(
            ErrorCode.UNSUPPORTED_ARCHITECTURE,
            f"The model's cache holds other states than keys and values: a block asked it for {name}.",
            hint="Leave `kv-cache` out.",
        )

    def take(self) -> dict[str, Tensor]:
        """Return the largest magnitudes of the last block, by `k` and `v`, and reset them.

        Raises NightpressError(unsupported_architecture) if the block cached nothing.
        """
        taken, self._largest = self._largest, {}
        if not taken:
            raise NightpressError(
                ErrorCode.UNSUPPORTED_ARCHITECTURE,
                "A block of the model caches no keys and values.",
                hint="Leave `kv-cache` out.",
            )
        return taken
