"""Encoders at several times their speed by `shape-to-speed`, beside plain distillation to fewer layers at the same speed.

    python -m bench.shape_to_speed KIND MODEL DATA                measures the table of times here, on --threads cores
    python -m bench.shape_to_speed KIND MODEL DATA --press OUT [--device cuda]  trains by that table; writes the models to OUT
    python -m bench.shape_to_speed KIND MODEL DATA --measure OUT                measures them here, in int8, on --threads cores

KIND is `classifier`, `embedder` or `reranker` (see bench/shape_kinds.py); MODEL the folder of a classifier, or for the others of an
embedder; `minilm` is all-MiniLM-L6-v2 from its package.
DATA has rt_sentiment_train.jsonl.gz, rt_sentiment_test.jsonl.gz, lm_train_austen_moby.txt.gz, lm_eval_persuasion.txt.gz and `similarity`.
The table is of --runtime and --type. Speeds are those over the source in float in the faster of OpenVINO and ONNX Runtime, by turns at
1 × 128 tokens; the pass is asked for 5% more. A model with fewer layers has as many as the table allows at that speed, and gets as many
training steps as the shaped model of that speed. A change of a quality has a 95% interval of paired differences.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from bench.record import finish, make_parser
from bench.shape_kinds import KINDS
from bench.shape_press import Times, base_of, options_of, press, run_job
from nightpress.core.compress.context import PassContext
from nightpress.core.compress.passes.latency_table import latency_table
from nightpress.core.recipes.inspect import FolderFiles, inspect_model


def main() -> int:
    parser = make_parser("shape_to_speed", __doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--table", type=Path, help="default: bench/data/shape_to_speed_KIND.json")
    parser.add_argument("--press", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--only", nargs="+", choices=["shape", "layers"], default=["shape", "layers"])
    parser.add_argument("--job", help="one of the jobs that --press starts")
    parser.add_argument(
        "--epochs", type=int, help="passes over the rows after each step to a speed; default: the kind's"
    )
    parser.add_argument("--teacher-epochs", type=int, default=3, help="of a reranker's own training")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--runtime", choices=["openvino", "onnxruntime"], default="onnxruntime")
    parser.add_argument("--type", choices=["float", "int8"], default="int8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=400, help="then --press stops its jobs, and packs what they have"
    )
    parser.add_argument("--most", type=float, default=62, help="MB of the files that --press writes")
    given = parser.parse_args()
    given.table = given.table or Path(__file__).parent / "data" / f"shape_to_speed_{given.kind}.json"
    if given.job is not None:
        return run_job(given)
    if given.press is not None:
        return press(given)
    if given.measure is None:
        write_table(given)
        return 0
    from bench.shape_measure import measure

    choices = ("kind", "model", "data", "table", "measure", "only", "device", "runtime", "type")
    return finish("shape_to_speed", measure(given), parser, given, choices=choices)


def write_table(given: Namespace) -> None:
    """Measure the table on this machine, and which runtime runs the source fastest."""
    from bench.shape_measure import best_source, faster, graphs, timed
    from nightpress.core.compress.stages.stopwatch import GraphStopwatch

    with tempfile.TemporaryDirectory(prefix="nightpress-bench-") as scratch:
        work = Path(scratch)
        model, options = base_of(given, work), options_of(given, [2.0])
        header = inspect_model(FolderFiles(model))
        context = PassContext(
            header=header,
            work_dir=work / "work",
            threads=given.threads,
            stopwatch=GraphStopwatch(model, work / "timed", given.threads),
            progress=lambda share, text: print(f"{share:4.0%} {text}", file=sys.stderr, flush=True),
        )
        table = latency_table(model, options, options.anatomy(header), context)
        rounds = timed(given, {"source": graphs(given, model, {}, work / "source", int8=False)}, work / "times")
        own = "source", {"onnxruntime": "onnx"}.get(given.runtime, given.runtime)
        ahead, *_ = faster(rounds, own, best_source(rounds))
    times = Times(table, ahead)
    times.write(given.table)
    print(given.table.read_text())


if __name__ == "__main__":
    sys.exit(main())
