"""The common part of all runners: runs a loaded model on given token ids, writes the outputs, and times it. Needs only numpy.

A runner is a script `<consumer>_runner.py` beside this file. Its function `load(request)` returns up to five values:

1. `forward(ids, mask, types)`: takes two int64 arrays [B, S], and for pairs of texts a third one with the type of each token; for images, float32 pixels [B, C, H, W] and a mask [B, 1]; for sound, float32 features [B, bands, frames] and a mask [B, 1]. An encoder-decoder's also takes `decoder`, the decoder's tokens [B, T], as a keyword. Returns the model's first output as a float32 array. If the model has a cache, `forward.continued` computes the same in two steps through the cache. If another process runs the model, `forward.peak_memory` is that process's peak in bytes. `forward.loaded_as`, if there is one, says how the model was loaded: device, name of the processor or GPU, dtype, dispatched. `forward.wrote` is a text that the model wrote. On a GPU, `forward` is a `transformers_runner.OnGpu`, which also computes what is kept of the logits there, and `forward.peak_gpu` is the peak of the GPU's memory in bytes.
2. `versions`: library → version.
3. `snippet`: the code that loaded the folder. The runner executes this text, so a report shows exactly the code that ran.
4. `generate(ids, new_tokens)`: continues a prompt [S] greedily and returns a list of token ids. Only the source's runner needs it.
5. `waits(ids, tokens, cached)`: decodes `tokens` tokens for prompts [B, S]. Returns the milliseconds before each token, and the tokens [B, tokens]. Only transformers is called with `cached` false.

The working directory contains the folder. The request is a JSON file: folder, task, pooling, threads, device (cpu or cuda), longest (tokens of a text), float32
(whether the runtime must not choose bfloat16), prefix (first tokens of an encoder-decoder's decoder), probes (layers to be asked one by one, see `_run_probes`), renumber (see renumbered.py, or null), part (number of this process's part of the examples, and how many there are), inputs (.npz), outputs (.npz), answer (.json), reference (.npz or null) and sets. Each set
has a name, a kind (`pooled`, `logits`, `last`, `steps`, `tokens`, `generated` or, for vLLM, `written`) and `rows`, the size of a batch. Its arrays in `inputs` are named
`<name>.ids` and so on.

When the sets are done and the answer is written, the process prints `@ready`. Then it reads JSON lines from standard input until that is
closed. Each line asks for one timed run. So several models can be timed by turns.
"""

import contextlib
import gc
import json
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Request = dict[str, Any]
Forward = Callable[[Array, Array], Array]
Generate = Callable[[Array, int], list[int]]
PROBE = "probe."  #: how the names of single layers' answers begin
LOADING = "loading"  #: how the messages begin that are sent while the model is loaded
_TELL_EVERY_S = 5.0
_SETTLE_S = 0.1  #: untimed seconds before a timed run
_FIRST_TOKENS = 8  #: of a prompt; these are decoded until decoding is timed
_CUT = -1e29  #: log-probabilities below it are of tokens that were cut; see renumbered.py
_TOLD_S = 300.0
Waits = Callable[[Array, int, bool], tuple[list[float], Array]]


def main(load: Callable[[Request], Any]) -> None:
    request = json.loads(Path(sys.argv[1]).read_bytes())
    started = time.perf_counter()
    gc.disable()  # the libraries' objects are no garbage: looking through them takes a third of the time of their import
    if request["renumber"]:
        from renumbered import renumbered_prefix  # type: ignore[import-not-found]

        request["prefix"] = renumbered_prefix(request)
    with every_few_seconds(lambda spent: _say(0.0, f"{LOADING} for {spent:.0f} s")):
        forward, versions, snippet, *decoding = load(request)
    gc.freeze()
    gc.enable()
    generate, waits = (*decoding, None, None)[:2]
    if request["renumber"]:
        from renumbered import Renumbered, renumbered_waits

        forward = Renumbered(forward, request["renumber"], request, pool)
        waits = waits and renumbered_waits(waits, forward)
    loaded_s = time.perf_counter() - started
    inputs = np.load(request["inputs"])
    reference = np.load(request["reference"]) if request["reference"] else None
    memory = _Memory()
    outputs = run_sets(forward, generate, request, inputs, reference) | _run_probes(forward, request["probes"])
    # Written atomically: the parent must not read a half-written file.
    unfinished = Path(request["outputs"] + ".partial.npz")
    np.savez(unfinished, **outputs)  # type: ignore[arg-type]  # the stub takes ** for its keyword
    unfinished.replace(request["outputs"])
    answer = {
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **versions},
        "snippet": snippet,
        "load_seconds": loaded_s,
        "decodes": waits is not None,
        "loaded_as": {**getattr(forward, "loaded_as", {"device": "cpu"}), **_truncation(request["folder"])},
        "wrote": getattr(forward, "wrote", ""),
    }
    Path(request["answer"]).write_text(json.dumps(answer))
    _answer("ready", {}, forward, memory)
    for line in sys.stdin:
        wanted = json.loads(line)
        _answer("timed", _timed(forward, waits, wanted, inputs, memory), forward, memory)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some runtimes take long to unload, and everything is written


def _truncation(folder: str) -> dict[str, int]:
    """The number of an embedding's dimensions that sentence-transformers keeps, if the folder says it."""
    file = Path(folder, "config_sentence_transformers.json")
    kept = json.loads(file.read_bytes()).get("truncate_dim") if file.is_file() else None
    return {} if kept is None else {"truncate_dim": kept}


def _timed(forward: Forward, waits: Waits, wanted: dict[str, Any], inputs: Any, memory: "_Memory") -> dict[str, Any]:
    """One run of what a line asks for: several requests at a time, decoding, or a pass over whole texts."""
    if "requests" in wanted:
        prompts = np.resize(inputs["timing.ids"], (wanted["requests"], wanted["prompt"]))
        found: dict[str, Any] = forward.served(prompts, wanted["tokens"])  # type: ignore[attr-defined]  # vLLM's runner has it
        return found
    return _write(waits, wanted, inputs, memory) if "prompt" in wanted else _time(forward, wanted, inputs)


def run_sets(
    forward: Forward, generate: Generate | None, request: Request, inputs: Any, reference: Any
) -> dict[str, Array]:
    """The model's outputs for every set, by name. inputs, reference: arrays by name; reference None: this model is the source."""
    outputs: dict[str, Array] = {}
    for at, wanted in enumerate(request["sets"]):
        name = wanted["name"]
        _say(at / len(request["sets"]), name)
        own = own_examples(len(inputs[f"{name}.ids"]), wanted["rows"], request.get("part", (0, 1)))
        if own.start == own.stop:
            continue
        arrays = {key: inputs[key][own] for key in inputs if key.startswith(f"{name}.")}
        if wanted["kind"] == "generated":
            from generated import continuations  # type: ignore[import-not-found]

            written = None if reference is None else {f"{name}.tokens": reference[f"{name}.tokens"][own]}
            outputs |= continuations(forward, generate, wanted, arrays, written)
        else:
            first = int(np.count_nonzero(inputs[f"{name}.compared"][: own.start])) if wanted["kind"] == "tokens" else 0
            outputs |= _run_set(forward, wanted, arrays, reference, request, first)
    return outputs


def own_examples(count: int, rows: int, part: Sequence[int]) -> slice:
    """The examples of a process that has a part of them: neighbouring whole batches. part: number of the part, and how many there are."""
    batches, (number, of) = -(-count // rows), part
    return slice(min(count, number * batches // of * rows), min(count, (number + 1) * batches // of * rows))


def probe_vectors(columns: int) -> Array:
    """The vectors that a layer with so many inputs is asked with: float32 [4, columns], half of the numbers 1 and the others 0.

    Both are exact in 8 bits, so a layer that rounds its inputs gives the same answers as one that does not.
    """
    vectors: Array = np.random.default_rng(columns).integers(0, 2, (4, columns)).astype(np.float32)
    return vectors


def probe_rows(rows: int) -> NDArray[np.int64]:
    """The outputs of a layer that are compared: at most 64, evenly spread."""
    return np.unique(np.linspace(0, rows - 1, min(rows, 64)).astype(np.int64))


def _run_probes(forward: Forward, layers: dict[str, float]) -> dict[str, Array]:
    """The answers of single layers, [4, rows] each. Layers that the model does not have under their names are left out.

    layers: name → the factor by which the vectors are multiplied before the layer, and its answers divided after it.
    """
    found: dict[str, Array] = {}
    if layers:
        _say(1.0, f"asking {len(layers)} layers")
    for name, factor in layers.items():
        probed = forward.probed(name, factor)  # type: ignore[attr-defined]  # only runners that have it are asked
        if probed is not None:
            found[f"{PROBE}{name}"] = probed
    return found


def _answer(what: str, found: dict[str, Any], forward: Forward, memory: "_Memory") -> None:
    """Send a message to the parent, with the peaks of the process's and the GPU's memory in bytes so far; None: unknown, or no GPU."""
    peak = max(memory.whole() or 0, getattr(forward, "peak_memory", 0)) or None
    peaks = {"process_peak_bytes": peak, "gpu_peak_bytes": getattr(forward, "peak_gpu", None)}
    print(f"@{what} {json.dumps({**found, **peaks})}", flush=True)


def execute(snippet: str) -> dict[str, Any]:
    """Run a snippet and return the variables that it sets."""
    names: dict[str, Any] = {}
    exec(compile(snippet, "<snippet>", "exec"), names)  # noqa: S102 - the text comes from the runner itself
    return names


@contextlib.contextmanager
def every_few_seconds(tell: Callable[[float], None]) -> Iterator[None]:
    """Call `tell` every few seconds with the seconds that the block has taken, at most five minutes: what hangs must not look alive."""
    ended, began = threading.Event(), time.monotonic()

    def run() -> None:
        while not ended.wait(_TELL_EVERY_S) and (spent := time.monotonic() - began) < _TOLD_S:
            tell(spent)

    teller = threading.Thread(target=run, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _say(fraction: float, text: str) -> None:
    print(f"@progress {fraction:.4f} {text}", flush=True)


def _run_set(
    forward: Forward, wanted: dict[str, Any], inputs: Any, reference: Any, request: Request, first: int
) -> dict[str, Array]:
    """The outputs for a set's examples. first: number of compared positions in examples that other processes have before these."""
    name, kind = wanted["name"], wanted["kind"]
    ids, mask = inputs[f"{name}.ids"], inputs[f"{name}.mask"]
    parts: list[dict[str, Array]] = []
    for start in range(0, len(ids), wanted["rows"]):
        rows = slice(start, start + wanted["rows"])
        # Padding beyond the batch's longest row would only cost time.
        width = int(mask[rows].sum(axis=1).max())
        given = ids[rows, :width] if ids.ndim == 2 else ids[rows]
        read = {"decoder": inputs[f"{name}.decoder"][rows]} if f"{name}.decoder" in inputs else {}
        # The verification of a model with a cache also tests the cache.
        run = getattr(forward, "continued", forward) if kind in {"last", "steps"} else forward
        if kind == "tokens":
            score = getattr(forward, "scored", partial(_score, forward))
            longest = inputs[f"{name}.targets"].shape[1] if read else width
            targets, compared = (inputs[f"{name}.{key}"][rows, :longest] for key in ("targets", "compared"))
            parts.append(score(given, mask[rows, :width], targets, compared, **read))
            continue
        if kind == "written":
            parts.append(forward.written(given, mask[rows, :width], wanted["new_tokens"]))  # type: ignore[attr-defined]
            continue
        typed = (inputs[f"{name}.types"][rows, :width],) if f"{name}.types" in inputs else ()
        out = run(given, mask[rows, :width], *typed, **read)
        if kind == "last":
            part = {"values": out[np.arange(len(out)), mask[rows, :width].sum(axis=1) - 1]}
        elif kind == "pooled":
            part = {"values": pool(out, mask[rows, :width], request["pooling"])}
        else:
            part = {"values": out}
        parts.append(part)
    merged = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if kind == "tokens":
        logp = merged.pop("logp")
        if reference is None:
            merged["reference"] = logp
        else:
            theirs = reference[f"{name}.reference"]
            # Tokens that this model has. The source's distribution over the others is left out.
            known = logp[:1].min(axis=0, initial=0) > _CUT
            if not known.all():
                logp, theirs = logp[:, known], theirs[:, known]
                theirs = theirs - _log_sum_exp(theirs)[:, None]
            mean = theirs.mean(axis=0, dtype=np.float64)  # of all examples
            theirs = theirs[first : first + len(logp)]
            merged["kl"] = (np.exp(theirs) * (theirs - logp)).sum(axis=1, dtype=np.float64)
            merged["products"] = centred_products(logp, theirs, mean)
    return {f"{name}.{key}": value for key, value in merged.items()}


def text_feeds(names: Collection[str], ids: Array, mask: Array, types: Array | None) -> dict[str, Array]:
    """The inputs of a graph that reads texts, of those with these names. ids [B, T]: the last T of the S tokens of mask [B, S].

    types: of the tokens, [B, T]; None: all 0.
    """
    feeds = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in names:
        feeds["token_type_ids"] = np.zeros_like(ids) if types is None else types
    if "position_ids" in names:
        feeds["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
    return feeds


def pool(hidden: Array, mask: Array, pooling: str) -> Array:
    """Pool token vectors [B, S, H], padded on the right, to one vector per text: [B, H], or [B, H · modes] for modes joined by `+`.

    Vectors that are pooled already, [B, H], are returned unchanged.
    """
    if hidden.ndim == 2:
        return hidden
    found: Array = np.concatenate([_pool(hidden, mask[:, :, None], mode) for mode in pooling.split("+")], axis=1)
    return found


def _pool(hidden: Array, mask: Array, mode: str) -> Array:
    """Pool by one mode → [B, H]. mask [B, S, 1]; the modes have their names in sentence-transformers."""
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        last: Array = hidden[np.arange(len(hidden)), np.maximum(mask[:, :, 0].sum(axis=1), 1) - 1]
        return last
    pooled: Array
    if mode == "max":
        pooled = np.where(mask > 0, hidden, -np.inf).max(axis=1)
        return pooled
    weights: Array = mask.astype(np.float32)
    if mode == "weightedmean":
        weights = weights * np.arange(1, hidden.shape[1] + 1, dtype=np.float32)[:, None]
    length = np.maximum(weights.sum(axis=1), 1)
    pooled = (hidden * weights).sum(axis=1) / (np.sqrt(length) if mode == "mean_sqrt_len_tokens" else length)
    return pooled


def centred_products(ours: Array, theirs: Array, mean: Array | None = None) -> Array:
    """For each row: ours · theirs, |ours|² and |theirs|², after the mean row of theirs is subtracted from both. [N, H] each → [N, 3].

    mean: the mean row [H], where these are some of the rows. The mean row does not tell the rows apart. Without it, a model that gives the same output for every row gets no credit.
    """
    mean = theirs.mean(axis=0, dtype=np.float64) if mean is None else mean
    found = np.empty((len(ours), 3))
    for at, (mine, base) in enumerate(zip(ours, theirs, strict=True)):  # row by row, because distributions are wide
        a, b = mine - mean, base - mean
        found[at] = a @ b, a @ a, b @ b
    return found


def _log_sum_exp(logits: Array) -> Array:
    """log Σ exp over the last axis: [..., V] → [...]. Works in chunks, so that no second array of all logits is needed."""
    out = np.empty(logits.shape[:-1], np.float64)
    flat, result = logits.reshape(-1, logits.shape[-1]), out.reshape(-1)
    for start in range(0, len(flat), 64):
        chunk = flat[start : start + 64]
        top = chunk.max(axis=1)
        result[start : start + 64] = np.log(np.exp(chunk - top[:, None]).sum(axis=1, dtype=np.float64)) + top
    return out


def _score(
    forward: Forward, ids: Array, mask: Array, targets: Array, compared: Array, **read: Array
) -> dict[str, Array]:
    """What is kept of a batch's logits: `nll` and `top1` [M] where targets ≥ 0, and `logp` [R, V] at the compared positions."""
    logits = forward(ids, mask, **read)
    return _score_tokens(logits, targets) | {"logp": _log_probabilities(logits, compared)}


def _score_tokens(logits: Array, targets: Array) -> dict[str, Array]:
    """logits [B, S, V], targets [B, S] with -1 for positions that are not scored → `nll` and `top1`, [M] each, for the scored positions."""
    row, column = np.nonzero(targets >= 0)
    chosen = logits[row, column]  # [M, V]
    wanted = targets[row, column]
    at = np.arange(len(wanted))
    return {"nll": _log_sum_exp(chosen) - chosen[at, wanted], "top1": chosen.argmax(axis=1).astype(np.int64)}


def _log_probabilities(logits: Array, marked: Array) -> Array:
    """Log-probabilities at the marked positions: logits [B, S, V], marked [B, S] → [R, V] float32."""
    chosen = logits[np.nonzero(marked)].astype(np.float32)
    result: Array = (chosen - _log_sum_exp(chosen)[:, None]).astype(np.float32)
    return result


def _time(forward: Forward, shape: dict[str, int], inputs: Any) -> dict[str, Any]:
    """Time a run on real text of the shape, in milliseconds."""
    sample = inputs["timing.ids"]
    ids = np.resize(sample, (shape["batch"], *(sample.shape if sample.ndim > 1 else (shape["length"],))))
    mask = np.ones((len(ids), shape["length"]), np.int64)
    run = getattr(forward, "timed", forward)
    _settle(lambda: run(ids, mask))
    start = time.perf_counter()
    run(ids, mask)
    return {"milliseconds": 1000 * (time.perf_counter() - start)}


def _write(waits: Waits, wanted: dict[str, Any], inputs: Any, memory: "_Memory") -> dict[str, Any]:
    """Time a decoding run: milliseconds before each token, the peak memory during the run, and the tokens [B, tokens]."""
    sample = inputs["timing.ids"]
    ids = np.resize(sample, (wanted["batch"], *(sample.shape if sample.ndim > 1 else (wanted["prompt"],))))
    first = ids[:, :_FIRST_TOKENS] if sample.ndim == 1 else ids
    _settle(lambda: waits(first, 1, wanted["cached"]))
    memory.start()
    taken, text = waits(ids, wanted["tokens"], wanted["cached"])
    return {"milliseconds": list(taken), "peak_memory_bytes": memory.stop(), "text": np.asarray(text).tolist()}


def _settle(run: Callable[[], object]) -> None:
    """Run untimed for a moment, at least once.

    Models take turns in processes of their own. In the first runs of a turn the caches hold another model, and threads are not yet spread over
    the cores, on which the other process's threads still spin.
    """
    until = time.perf_counter() + _SETTLE_S
    run()
    while time.perf_counter() < until:
        run()


class _Memory:
    """The peak of this process's memory: in total, and between `start` and `stop` if the kernel allows to reset its mark. None: unknown."""

    def __init__(self) -> None:
        self._before = 0

    def start(self) -> None:
        self._before = self.whole() or 0
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._since = True
        except OSError:
            self._since = False

    def stop(self) -> int | None:
        return _peak_memory() if self._since else None

    def whole(self) -> int | None:
        return max(self._before, _peak_memory() or 0) or None


def _peak_memory() -> int | None:
    # VmHWM is the peak of this address space. ru_maxrss would also count the memory of the process that started this one.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) or None
