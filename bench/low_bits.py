"""Learned rounding, GPTQ and plain rounding at 4 bits and below, beside auto-round: same model, same calibration tokens, by turns.

    python -m bench.low_bits --peer PYTHON [--only NAME …] [--methods NAME …] [--models offgrid smollm] [--seeds 0 1 2] [--device cuda]
        [--calibrations text builtin:prose builtin:mixture] [--grids symmetric zero-points] [--keep FOLDER]
    python -m bench.low_bits --kept FOLDER ...

All of it takes hours. So several calls may share the work on one machine: with `--keep` each writes its runs to FOLDER, and `--kept` takes the
figures from there and runs nothing. Seconds are then those of runs side by side.

PYTHON: of an environment with auto-round 0.16 (bench/peer-autoround-requirements.txt). Without it, only our figures are taken.

Each figure is the loss over the float model in nats a token, on text that calibrated nothing: in domain (a novel; the calibration text is
novels) and out of domain (the reference of the Python language, which every Python brings). Mean over the seeds, and their range. A seed
chooses the calibration text and the order of the steps. Of zero points or none, each method's better mean counts. `seconds` are those of the
quantization alone: our pass, and the peer's `quantize`. Both models of bench.offgrid are measured: SmolLM2-135M's own weights were 4-bit.

W4A4: the layers' inputs are rounded while the loss is taken, ours by compressed-tensors in transformers, the peer's by our code with the
same rules. W4A8 rounds inputs in groups of 128, and SmolLM2's layers have 576. `gptq+recover` and `learned+recover`: `recover-scales`
behind the pass, trained on the novels; the share of the loss that it recovers is taken on the same held-out texts. `--calibrations` compares
calibration texts: the novels, and what is built in. The built-in texts hold about 65,000 tokens of each kind: `--samples 64 --length 1024` gives all calibrations as many. `learned extremes` and
`learned better` are `learned-rounding` with another start. NIGHTPRESS_BENCH_DATA names the folder of the novels.
"""

import gc
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.low_bits_runs import DOMAINS, Taken, figures_of, keep_run, mixture_over_prose, read_runs
from bench.offgrid import UPDATE, offgrid_dir
from bench.peers import auto_round
from bench.quality import SHARED, press, windows
from bench.record import Figure, finish, make_parser
from nightpress.core.compress.calibration.samples import calibration_samples
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.data.tokenized import open_tokenizer
from nightpress.core.compress.grids.rounded_inputs import input_global_scale, round_inputs
from nightpress.core.compress.runners.transformers_runner import UNPACK, rounds_fp4_inputs
from nightpress.core.recipes.calibration import MIXTURE, PROSE, Calibration
from nightpress.core.recipes.inspect import FolderFiles, inspect_model
from nightpress.core.recipes.schemes import Activations, Scheme
from tests.models import smollm_dir

_FP4 = {"act_bits": 16}  # weights alone
_FORMATS = {"mxfp4": 32, "nvfp4": 16}  # format → inputs that share a scale
_EXTENDED = {"enable_alg_ext": True}  # the peer's own advice at 2 bits


@dataclass(frozen=True)
class Setting:
    ours: dict[str, Any]  #: options of our passes
    peer: dict[str, Any]  #: arguments of the peer

    @property
    def rounded_inputs(self) -> Scheme | None:
        """The scheme by which inputs are rounded; None: they stay in float."""
        if "activations" not in self.ours:
            return None
        return Scheme(4, "float", "group", _FORMATS[self.ours["format"]], activations=Activations(bits=4))


def _integers(bits: int, group: int) -> list[Setting]:
    extra = _EXTENDED if bits == 2 else {}
    return [
        Setting(
            {"bits": bits, "group_size": group, "symmetric": symmetric},
            {"scheme": "W4A16", "bits": bits, "group_size": group, "sym": symmetric, **extra},
        )
        for symmetric in (True, False)
    ]


SETTINGS = {
    "W4 g64": _integers(4, 64),
    "W4 g32": _integers(4, 32),
    "W3 g64": _integers(3, 64),
    "W2 g64": _integers(2, 64),
    "mxfp4": [Setting({"format": "mxfp4"}, {"scheme": "MXFP4", **_FP4})],
    "nvfp4": [Setting({"format": "nvfp4"}, {"scheme": "NVFP4", **_FP4})],
    "mxfp4 W4A4": [Setting({"format": "mxfp4", "activations": "fp4"}, {"scheme": "MXFP4"})],
    "nvfp4 W4A4": [Setting({"format": "nvfp4", "activations": "fp4"}, {"scheme": "NVFP4"})],
}
_NEAREST = {"pass": "weight-only", "ranges": "least-error"}
_LEARNED = {"pass": "learned-rounding"}
#: method → (our rounding pass, whether `recover-scales` follows)
PASSES: dict[str, tuple[dict[str, Any], bool]] = {
    "nearest": (_NEAREST, False),
    "gptq": ({"pass": "gptq"}, False),
    "gptq natural": ({"pass": "gptq", "order": "natural"}, False),
    "awq": ({"pass": "awq"}, False),
    "learned": (_LEARNED, False),
    "learned better": ({**_LEARNED, "start": "better"}, False),
    "learned extremes": ({**_LEARNED, "ranges": "extremes"}, False),
    "gptq+recover": ({"pass": "gptq"}, True),
    "learned+recover": (_LEARNED, True),
}
METHODS = (*PASSES, "auto-round")
USUAL = ("nearest", "gptq", "learned", "auto-round")
CALIBRATIONS = ("text", PROSE, MIXTURE)
GRIDS = {"symmetric": True, "zero-points": False}


@dataclass(frozen=True)
class Texts:
    """Held-out token ids [samples, length] of each domain, and the float model's log probabilities of its tokens for each."""

    ids: tuple[Tensor, ...]
    nats: tuple[float, ...]  #: the float model's mean loss
    logits: tuple[Tensor, ...]  #: bfloat16 [samples, length, vocabulary] of the first samples


def main() -> int:
    parser = make_parser("low_bits", __doc__)
    parser.add_argument("--peer", help="the Python of the peer's environment")
    parser.add_argument("--only", nargs="*", choices=sorted(SETTINGS))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=USUAL)
    parser.add_argument("--calibrations", nargs="*", choices=CALIBRATIONS, default=("text",))
    parser.add_argument("--grids", nargs="*", choices=GRIDS, default=tuple(GRIDS), help="of integers")
    parser.add_argument("--recover-steps", type=int, default=400, help="of `recover-scales`, 16 × 512 tokens each")
    parser.add_argument("--recover-rate", type=float, default=1e-3, help="its learning rate")
    parser.add_argument("--models", nargs="*", choices=("offgrid", "smollm"), default=("offgrid", "smollm"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="of calibration text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=32, help="samples of 512 tokens of each domain")
    parser.add_argument("--keep", type=Path, help="write each run to a file of this folder")
    parser.add_argument("--kept", type=Path, help="run nothing: take the runs of this folder")
    options = parser.parse_args()
    kept = None if options.kept is None else read_runs(options.kept)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as library

    library.disable_progress_bar()
    figures: list[Figure] = []
    for model in options.models:
        if model == "offgrid" and not UPDATE.exists():
            print(f"{UPDATE} is missing: run bench.offgrid on a GPU first", file=sys.stderr)
            continue
        source = (offgrid_dir if model == "offgrid" else smollm_dir)("bfloat16")
        texts = held_out(source, options.held_out, options.device)
        figures += [
            Figure(f"{model}/float/{domain} nats", round(nats, 4))
            for domain, nats in zip(DOMAINS, texts.nats, strict=True)
        ]
        for ref in options.calibrations:
            told = model if ref == "text" else f"{model} by {ref}"
            for name in options.only or SETTINGS:
                what = f"{told}/{name}/{options.samples} x {options.length}/{options.steps} steps"
                if kept is None:
                    figures += figures_of(told, name, list(measure(source, name, ref, what, texts, options)))
                else:
                    figures += figures_of(told, name, kept.get(what, []))
        figures += mixture_over_prose(model, figures)
    choices = ("only", "methods", "models", "device", "peer", "calibrations", "keep", "kept")
    return finish("low_bits", figures, parser, options, choices=choices)


def measure(source: Path, name: str, ref: str, what: str, texts: Texts, options: Any) -> Iterator[Taken]:
    """Each method in turn, for each seed and each variant of a setting. ref: the calibration data. what: its name among runs that are kept."""
    files = {"text": NOVELS} if NOVELS.exists() else {}
    if ref == "text" and not files:
        ref = PROSE
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            calibration = Calibration(data=ref, samples=options.samples, length=options.length, seed=seed)
            header = inspect_model(FolderFiles(source))
            context = PassContext(
                header=header, work_dir=work, calibration=calibration, data_files=files, device=options.device
            )
            tokens = work / "calibration.npy"
            np.save(tokens, calibration_samples(source, context)["input_ids"].numpy())
            for variant, setting in enumerate(SETTINGS[name]):
                for method in options.methods:
                    if not _possible(method, setting, options):
                        continue
                    out, rounds = work / f"{method}-{variant}", None
                    if method == "auto-round":
                        chosen = {**setting.peer, "iters": options.steps, "seed": seed + 1}
                        seconds = auto_round(options.peer, source, chosen, tokens, out)["seconds"]
                        rounds = setting.rounded_inputs
                    else:
                        if (work / "own-texts").is_dir():  # each pass would let the model write them again
                            shutil.copytree(work / "own-texts", out / "work" / "own-texts")
                        start = time.perf_counter()
                        out = press(
                            source, out, passes_of(method, setting, options), calibration, files, options.device
                        )
                        seconds = time.perf_counter() - start
                    peaks = None if rounds is None else torch.from_numpy(np.load(tokens)[:8])
                    lost, divergence = compare(out, texts, options.device, rounds, peaks)
                    taken = Taken(method, variant, lost, divergence, seconds)
                    print(name, ref, "seed", seed, taken, file=sys.stderr, flush=True)
                    if options.keep is not None:
                        keep_run(options.keep, what, taken)
                    yield taken


def _possible(method: str, setting: Setting, options: Any) -> bool:
    if setting.ours.get("symmetric", True) not in [GRIDS[name] for name in options.grids]:
        return False
    if method == "auto-round":
        return options.peer is not None
    if method == "awq" and "format" in setting.ours:
        return False
    # Rounding to nearest reads no calibration text, so it can't find the scale of nvfp4's inputs.
    return method != "nearest" or setting.ours.get("format") != "nvfp4" or "activations" not in setting.ours


def passes_of(method: str, setting: Setting, options: Any) -> list[dict[str, Any]]:
    rounding, recovers = PASSES[method]
    steps = {"steps": options.steps} if rounding["pass"] == "learned-rounding" else {}
    passes = [{**rounding, **setting.ours, **steps}]
    if recovers:
        train = {
            "data": "text" if NOVELS.exists() else PROSE,
            "length": 512,
            "batch": 16,
            "steps": options.recover_steps,
            "learning_rate": options.recover_rate,
            "weight_decay": 0,
            "validation": 0.02,
        }
        passes.append({"pass": "recover-scales", "train": train})
    return passes


NOVELS = SHARED / "lm_train_austen_moby.txt.gz"


def held_out(source: Path, samples: int, device: str, text: Path = SHARED / "lm_eval_persuasion.txt.gz") -> Texts:
    novel = windows(text if text.exists() else None, source, samples, 512)
    encoded = torch.tensor(open_tokenizer(source).encode(reference(), special=False))
    whole = encoded[: len(encoded) // 512 * 512].view(-1, 512)
    manual = whole[np.linspace(0, len(whole) - 1, samples).round().astype(int)]
    found = [logits_of(source, ids, device) for ids in (novel, manual)]
    nats = tuple(cross_entropy(logits, ids) for logits, ids in zip(found, (novel, manual), strict=True))
    return Texts((novel, manual), nats, tuple(found))


def reference() -> str:
    """The reference of the Python language."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


@torch.inference_mode()
def logits_of(
    folder: Path, ids: Tensor, device: str, rounds: Scheme | None = None, peaks: Tensor | None = None
) -> Tensor:
    """bfloat16 [samples, length, vocabulary] on the processor.

    rounds: round the inputs of the blocks' layers by this scheme. peaks: token ids from which nvfp4's scale of each layer's inputs is taken.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if getattr(model, "hf_quantizer", None) is not None and rounds_fp4_inputs(str(folder)):
        exec(UNPACK, {"model": model, "torch": torch})
    # Weights that are unpacked during loading may have another dtype.
    torch.nn.Module.to(model, device, torch.float32).eval()
    if rounds is not None and peaks is not None:
        round_layers(model, rounds, peaks.to(device))
    return torch.cat([model(batch.to(device)).logits.to("cpu", torch.bfloat16) for batch in ids.split(4)])


def round_layers(model: Any, scheme: Scheme, ids: Tensor) -> None:
    """Let all linear layers of the blocks round their inputs."""
    layers = [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "layers." in name]
    largest: dict[nn.Module, Tensor] = {}

    def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        largest[layer] = torch.maximum(args[0].abs().amax(), largest.get(layer, torch.zeros((), device=args[0].device)))

    seeing = [layer.register_forward_pre_hook(see) for layer in layers]
    for batch in ids.split(4):
        model(batch)
    for handle in seeing:
        handle.remove()
    for layer in layers:
        total = input_global_scale(largest[layer]) if scheme.has_input_global_scale else None
        layer.register_forward_pre_hook(
            lambda _layer, args, total=total: (round_inputs(args[0], scheme, total), *args[1:])
        )


def cross_entropy(logits: Tensor, ids: Tensor) -> float:
    total = 0.0
    for batch, tokens in zip(logits.split(4), ids.split(4), strict=True):
        predicted, right = batch[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(predicted, right, reduction="sum"))
    return total / ids[:, 1:].numel()


def compare(
    folder: Path, texts: Texts, device: str, rounds: Scheme | None, peaks: Tensor | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nats over the float model, and the KL divergence from it, by domain. rounds, peaks: as in `logits_of`."""
    lost, divergence = [], []
    for ids, nats, exact in zip(texts.ids, texts.nats, texts.logits, strict=True):
        found = logits_of(folder, ids, device, rounds, peaks)
        lost.append(cross_entropy(found, ids) - nats)
        total = 0.0
        for ours, theirs in zip(found.split(4), exact.split(4), strict=True):
            source = theirs.to(device).float().log_softmax(-1)
            total += float((source.exp() * (source - ours.to(device).float().log_softmax(-1))).sum())
        divergence.append(total / ids.numel())
    gc.collect()
    return tuple(lost), tuple(divergence)


if __name__ == "__main__":
    sys.exit(main())
