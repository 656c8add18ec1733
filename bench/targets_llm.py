"""The gains of the target `cpu-llm` on a small language model, beside llama.cpp's own quantizer, with PASS or MISS for each bar.

    python -m bench.targets_llm [--threads 2] [--rounds 3]

The model is SmolLM2-135M. Its weights were 4-bit before they were dequantized, which favours 4-bit files, both ours and llama.cpp's. By
hand means llama.cpp's own quantizer on an f32 file. Decoding is timed in new processes, in alternating order; each ratio is the median of
the ratios within a round. It needs llama-cpp-python.
"""

import ctypes
import gzip
import importlib.util
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from bench.pressing import folder_mb, press
from bench.processes import run_python
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.evaluate import quality
from nightpress.core.compress.export import gguf, safetensors
from nightpress.core.compress.export.consumer import run_consumer
from nightpress.core.recipes.builtins import get_recipe
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.models import parse_recipe
from tests.models import smollm_dir

PERSUASION = Path(__file__).parents[2] / "shared" / "data" / "lm_eval_persuasion.txt.gz"
SOURCE, OURS_Q4, OURS_Q8 = "transformers fp32", "ours: cpu-llm", "ours: gguf-lm (Q8_0)"
_PROMPT, _TOKENS = 128, 64
#: Greedy decoding through each library's own calls, one token at a time; prints the median of tokens per second.
_LLAMA_CPP = """
import sys, time, llama_cpp, numpy as np
file, threads, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:])
model = llama_cpp.Llama(file, n_ctx=prompt + tokens + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
def write():
    model.reset()
    model.eval(list(range(300, 300 + prompt)))
    waits, token = [], 1000
    for _ in range(tokens):
        start = time.perf_counter()
        model.eval([token])
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        token = int(np.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())
        waits.append(time.perf_counter() - start)
    return waits
write()
print(1 / np.median(write() + write()), flush=True)
"""
_TRANSFORMERS = """
import sys, time, torch, numpy as np
from transformers import AutoModelForCausalLM
folder, threads, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
def write():
    with torch.inference_mode():
        out = model(torch.arange(300, 300 + prompt)[None], use_cache=True)
        waits, token = [], torch.tensor([[1000]])
        for _ in range(tokens):
            start = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            waits.append(time.perf_counter() - start)
    return waits
write()
print(1 / np.median(write() + write()), flush=True)
"""


def main() -> int:
    parser = make_parser("targets_llm", __doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print("skipped: llama-cpp-python is not installed", file=sys.stderr)
        return 0
    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as folder:
        figures = measure(Path(folder), options.threads, options.rounds)
    return finish("targets_llm", figures, parser, options)


def measure(folder: Path, threads: int, rounds: int) -> list[Figure]:
    source = Path(shutil.copytree(smollm_dir(), folder / "smollm2-135m"))
    files = make_files(folder, source, threads)
    perplexity = perplexities(folder, source, files, threads)
    commands = {SOURCE: [_TRANSFORMERS, str(source)]}
    commands |= {name: [_LLAMA_CPP, str(artifact / gguf.FILE_NAME)] for name, artifact in files.items()}
    rounds_s = [_decode(commands, turn, threads) for turn in range(rounds)]
    figures = []
    for name in commands:
        figures += [
            Figure(
                f"forms/{name}/decode", round(1 / statistics.median(waits[name] for waits in rounds_s), 1), "tokens/s"
            ),
            Figure(f"forms/{name}/faster", round(_ratio(rounds_s, SOURCE, name), 2), "× transformers"),
            Figure(f"forms/{name}/perplexity", round(perplexity[name], 2)),
            Figure(f"forms/{name}/change", round(perplexity[name] / perplexity[SOURCE] - 1, 4), "of the perplexity"),
            Figure(f"forms/{name}/size", round(folder_mb(files.get(name, source)), 1), "MB"),
        ]
    return figures + bars_of(perplexity, rounds_s)


def make_files(folder: Path, source: Path, threads: int) -> dict[str, Path]:
    """Make GGUF files with our exporter and with llama.cpp's quantizer. Returns the form's name → its folder."""
    header = inspect_model(FolderFiles(source))
    unmeasured = get_recipe("cpu-llm").model_dump(mode="json") | {"evaluate": [], "gates": {}}
    press(folder / "targeted", source, parse_recipe(unmeasured), threads)
    files = {OURS_Q4: folder / "targeted" / "out" / "gguf-q8_0", OURS_Q8: folder / "ours-q8_0"}
    gguf.save(source, files[OURS_Q8], header, weights="q8_0", pooling="mean")
    gguf.save(source, folder / "f32", header, weights="f32", pooling="mean")
    for kind in ("Q8_0", "Q4_K_M", "Q4_0"):
        files[f"by hand: llama.cpp {kind}"] = _llama_cpp_quantize(folder / "f32", folder / f"by-hand-{kind}", kind)
    return files


def perplexities(folder: Path, source: Path, files: dict[str, Path], threads: int) -> dict[str, float]:
    """The perplexity of the source in transformers and of each file in llama.cpp, on the same text."""
    measured = {"metric": "perplexity", "samples": 32, "length": 512, "data": "builtin:prose"}
    brought = {}
    if PERSUASION.exists():
        measured["data"], brought["held-apart"] = "held-apart", folder / "held-apart.txt"
        brought["held-apart"].write_bytes(gzip.decompress(PERSUASION.read_bytes()))
    recipe = parse_recipe({"name": "bench", "passes": [], "exports": ["gguf"], "evaluate": [measured]})
    trial = quality.prepare(recipe, inspect_model(FolderFiles(source)), source, brought, threads=threads)
    scratch = folder / "scratch"
    reference = run_consumer(safetensors.CONSUMER, source, trial.task, name="source", scratch=scratch)
    found = {SOURCE: quality.measurements(trial, reference, None)[0].value}
    for at, (name, artifact) in enumerate(files.items()):
        seen = run_consumer(
            gguf.CONSUMER, artifact, trial.task, name=f"form{at}", scratch=scratch, reference=reference.outputs_file
        )
        measurements = quality.measurements(trial, reference, seen)
        found[name] = next(figure.value for figure in measurements if figure.name == "perplexity")
    return found


def bars_of(perplexity: dict[str, float], rounds_s: list[dict[str, float]]) -> list[Figure]:
    figures = []
    for bar, loss in ((5.5, 0.01), (6.0, 0.05), (7.0, 0.08)):
        near = [name for name in (OURS_Q4, OURS_Q8) if perplexity[name] <= (1 + loss) * perplexity[SOURCE]]
        fastest = max((_ratio(rounds_s, SOURCE, name) for name in near), default=0.0)
        what = f"times as fast as transformers, within {loss:.0%} of the perplexity"
        figures.append(Figure(f"bars/{what}/value", round(fastest, 2), "×", bar=f">= {bar:g}"))
    for ours, kind in ((OURS_Q8, "Q8_0"), (OURS_Q4, "Q4_0"), (OURS_Q4, "Q4_K_M")):
        theirs = f"by hand: llama.cpp {kind}"
        speed, worse = _ratio(rounds_s, theirs, ours), perplexity[ours] / perplexity[theirs]
        figures.append(Figure(f"bars/speed, {ours} beside {theirs}/value", round(speed, 3), "×", bar=">= 0.98"))
        figures.append(Figure(f"bars/perplexity, {ours} beside {theirs}/value", round(worse, 3), "×", bar="<= 1.02"))
    return figures


def _ratio(rounds_s: list[dict[str, float]], slow: str, fast: str) -> float:
    """The speed of `fast` relative to `slow`: the median of the ratios within a round."""
    return statistics.median(waits[slow] / waits[fast] for waits in rounds_s)


def _decode(commands: dict[str, list[str]], turn: int, threads: int) -> dict[str, float]:
    """Seconds per token of each form, in new processes."""
    found = {}
    order = list(commands.items())
    for name, (script, what) in order if turn % 2 == 0 else reversed(order):
        printed = run_python("-c", script, what, str(threads), str(_PROMPT), str(_TOKENS))
        found[name] = 1 / float(printed.split()[-1])
    return found


def _llama_cpp_quantize(floats: Path, target: Path, kind: str) -> Path:
    import llama_cpp

    target.mkdir()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    names = [str(folder / gguf.FILE_NAME).encode() for folder in (floats, target)]
    status = llama_cpp.llama_model_quantize(*names, ctypes.byref(options))
    if status:
        raise RuntimeError(f"llama.cpp's quantizer ended with status {status}")
    return target


if __name__ == "__main__":
    sys.exit(main())
