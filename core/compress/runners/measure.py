"""What every runner does with a loaded model: run the given token ids, write the outputs, time it. Needs numpy and nothing of Nightpress.

A runner is a script `<consumer>_runner.py` beside this file with `load(request) → (forward, versions, snippet)`, where `forward(ids, mask)`
takes two int64 arrays [B, S], or of images pixels as float32 [B, C, H, W] and a mask [B, 1], and returns the model's first output as a float32 array;
where the model keeps a cache, `forward.continued` does the same in two steps through it, and where another process runs the model,
`forward.peak_memory` is its peak in bytes. The snippet is the code that loaded the folder: it is
text that the runner executes, so that what a report shows is what was run. The working directory is the one that holds the folder.

The request is a JSON file: folder, task, pooling, threads, longest (tokens of a text), float32 (whether a runtime must not choose bfloat16), inputs (.npz), outputs (.npz), answer (.json), reference (.npz or null) and sets.
When the sets are done and the answer is written, the process says `@ready` and times what it is asked to, one JSON line a run on its standard
input, until that is closed: so several models can be timed by turns.
Each set has a name, a kind (`pooled`, `logits`, `last`, `tokens` or `generated`) and `rows` a batch; its arrays in `inputs` are called
`<name>.ids` and so on. The runner of the source also says how a causal language model goes on with a prompt: `load` then returns a fourth
thing, `generate(ids, new_tokens)`, from a prompt [S] to its greedy continuation, a list of token ids. A runner that can decode returns a
fifth, `waits(ids, tokens, cached)`, from prompts [B, S] to the milliseconds before each token that it writes, `tokens` of them, and the
tokens [B, tokens]; not `cached` is asked of transformers alone.
"""

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Request = dict[str, Any]
Forward = Callable[[Array, Array], Array]
Generate = Callable[[Array, int], list[int]]
Waits = Callable[[Array, int, bool], tuple[list[float], Array]]


def main(load: Callable[[Request], Any]) -> None:
    request = json.loads(Path(sys.argv[1]).read_bytes())
    started = time.perf_counter()
    forward, versions, snippet, *decoding = load(request)
    generate, waits = (*decoding, None, None)[:2]
    loaded_s = time.perf_counter() - started
    inputs = np.load(request["inputs"])
    reference = np.load(request["reference"]) if request["reference"] else None
    memory = _Memory()
    outputs = run_sets(forward, generate, request, inputs, reference)
    # Atomically: the parent must not take a half-written file for an answer.
    partial = Path(request["outputs"] + ".partial.npz")
    np.savez(partial, **outputs)  # type: ignore[arg-type]  # the stub takes ** for its keyword
    partial.replace(request["outputs"])
    answer = {
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **versions},
        "snippet": snippet,
        "load_seconds": loaded_s,
        "decodes": waits is not None,
    }
    Path(request["answer"]).write_text(json.dumps(answer))
    _answer("ready", {}, forward, memory)
    for line in sys.stdin:
        wanted = json.loads(line)
        timed = _write(waits, wanted, inputs, memory) if "prompt" in wanted else _time(forward, wanted, inputs)
        _answer("timed", timed, forward, memory)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some runtimes take long to unload, and everything is written


def run_sets(
    forward: Forward, generate: Generate | None, request: Request, inputs: Any, reference: Any
) -> dict[str, Array]:
    """The model's outputs for every set. inputs, reference: arrays by name; reference None: this is the source."""
    outputs: dict[str, Array] = {}
    for at, wanted in enumerate(request["sets"]):
        _say(at / len(request["sets"]), wanted["name"])
        if wanted["kind"] == "generated":
            outputs |= _continue(forward, generate, wanted, inputs, reference)
        else:
            outputs |= _run_set(forward, wanted, inputs, reference, request)
    return outputs


def _answer(what: str, found: dict[str, Any], forward: Forward, memory: "_Memory") -> None:
    """Tell the parent, and with it the most memory that the process has had; None: unknown."""
    peak = max(memory.whole() or 0, getattr(forward, "peak_memory", 0)) or None
    print(f"@{what} {json.dumps({**found, 'process_peak_bytes': peak})}", flush=True)


def execute(snippet: str) -> dict[str, Any]:
    """Run a snippet and return the names it bound."""
    names: dict[str, Any] = {}
    exec(compile(snippet, "<snippet>", "exec"), names)  # noqa: S102 - the text comes from the runner itself
    return names


def _say(fraction: float, text: str) -> None:
    print(f"@progress {fraction:.4f} {text}", flush=True)


def _run_set(
    forward: Forward, wanted: dict[str, Any], inputs: Any, reference: Any, request: Request
) -> dict[str, Array]:
    name, kind = wanted["name"], wanted["kind"]
    ids, mask = inputs[f"{name}.ids"], inputs[f"{name}.mask"]
    parts: list[dict[str, Array]] = []
    for start in range(0, len(ids), wanted["rows"]):
        rows = slice(start, start + wanted["rows"])
        # Padding beyond the batch's longest row would only cost time.
        width = int(mask[rows].sum(axis=1).max())
        given = ids[rows, :width] if ids.ndim == 2 else ids[rows]
        # The verification of a model with a cache goes through it.
        run = getattr(forward, "continued", forward) if kind == "last" else forward
        out = run(given, mask[rows, :width])
        if kind == "tokens":
            part = _score_tokens(out, inputs[f"{name}.targets"][rows, :width])
            part["logp"] = _log_probabilities(out, inputs[f"{name}.compared"][rows, :width])
        elif kind == "last":
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
            merged["kl"] = (np.exp(theirs) * (theirs - logp)).sum(axis=1, dtype=np.float64)
            merged["products"] = centred_products(logp, theirs)
    return {f"{name}.{key}": value for key, value in merged.items()}


def _continue(
    forward: Forward, generate: Generate | None, wanted: dict[str, Any], inputs: Any, reference: Any
) -> dict[str, Array]:
    """The source writes on, [N, new] with −1 after its end; an artifact says what it would have written at each of these places."""
    name = wanted["name"]
    ids, lengths = inputs[f"{name}.ids"], inputs[f"{name}.mask"].sum(axis=1)
    if reference is None:
        if generate is None:
            raise TypeError("the source's runner can't generate")
        tokens = np.full((len(ids), wanted["new_tokens"]), -1, np.int64)
        for at, length in enumerate(lengths):
            written = generate(ids[at, :length], wanted["new_tokens"])
            tokens[at, : len(written)] = written
        return {f"{name}.tokens": tokens}
    written = reference[f"{name}.tokens"]
    chosen = np.full_like(written, -1)
    whole = np.zeros((len(ids), ids.shape[1] + written.shape[1]), np.int64)
    mask = np.zeros_like(whole)
    counts = (written >= 0).sum(axis=1)
    for at, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        whole[at, : length + count] = np.concatenate([ids[at, :length], written[at, :count]])
        mask[at, : length + count] = 1
    for start in range(0, len(ids), wanted["rows"]):
        rows = slice(start, start + wanted["rows"])
        width = int(mask[rows].sum(axis=1).max())
        choice = forward(whole[rows, :width], mask[rows, :width]).argmax(axis=-1)  # [B, S]
        for at in range(start, min(start + wanted["rows"], len(ids))):
            first, count = lengths[at] - 1, counts[at]
            chosen[at, :count] = choice[at - start, first : first + count]
    return {f"{name}.tokens": chosen}


def pool(hidden: Array, mask: Array, pooling: str) -> Array:
    """Token vectors [B, S, H], padded on the right → one a text [B, H], or [B, H · modes] for modes joined by `+`. Pooled ones come back as they are."""
    if hidden.ndim == 2:
        return hidden
    found: Array = np.concatenate([_pool(hidden, mask[:, :, None], mode) for mode in pooling.split("+")], axis=1)
    return found


def _pool(hidden: Array, mask: Array, mode: str) -> Array:
    """mask [B, S, 1]; modes as sentence-transformers calls them."""
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


def centred_products(ours: Array, theirs: Array) -> Array:
    """Of each row: ours · theirs, |ours|² and |theirs|², both less the mean of all of their rows. [N, H] each → [N, 3]

    What all rows have in common says nothing of how well they are told apart: without it, one answer to everything comes to nothing.
    """
    mean = theirs.mean(axis=0, dtype=np.float64)
    found = np.empty((len(ours), 3))
    for at, (mine, base) in enumerate(zip(ours, theirs, strict=True)):  # a row at a time: distributions are wide
        a, b = mine - mean, base - mean
        found[at] = a @ b, a @ a, b @ b
    return found


def _log_sum_exp(logits: Array) -> Array:
    """[..., V] → [...], in place of a second array of logits where rows are many."""
    out = np.empty(logits.shape[:-1], np.float64)
    flat, result = logits.reshape(-1, logits.shape[-1]), out.reshape(-1)
    for start in range(0, len(flat), 64):
        chunk = flat[start : start + 64]
        top = chunk.max(axis=1)
        result[start : start + 64] = np.log(np.exp(chunk - top[:, None]).sum(axis=1, dtype=np.float64)) + top
    return out


def _score_tokens(logits: Array, targets: Array) -> dict[str, Array]:
    """logits [B, S, V], targets [B, S] with -1 for positions that don't count → one number a counted position."""
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
    """Milliseconds of a run on real text of the shape, behind one that isn't timed: what another process left in the caches doesn't count."""
    sample = inputs["timing.ids"]
    ids = np.resize(sample, (shape["batch"], *(sample.shape if sample.ndim > 1 else (shape["length"],))))
    mask = np.ones((len(ids), shape["length"]), np.int64)
    forward(ids, mask)
    start = time.perf_counter()
    forward(ids, mask)
    return {"milliseconds": 1000 * (time.perf_counter() - start)}


def _write(waits: Waits, wanted: dict[str, Any], inputs: Any, memory: "_Memory") -> dict[str, Any]:
    """Milliseconds before each token of a run, the peak of memory meanwhile, and the tokens [B, tokens]."""
    ids = np.resize(inputs["timing.ids"], (wanted["batch"], wanted["prompt"]))
    memory.start()
    taken, text = waits(ids, wanted["tokens"], wanted["cached"])
    return {"milliseconds": list(taken), "peak_memory_bytes": memory.stop(), "text": np.asarray(text).tolist()}


class _Memory:
    """The peak of this process's memory: as a whole, and between `start` and `stop` where the kernel lets its mark be set back. None: unknown."""

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
    # ru_maxrss would count the process that started this one; the kernel's high-water mark of this address space doesn't.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) or None
