"""2:4 zeros on a GPU: torch's semi-structured matrix product beside the dense one, and what its weights take.

    python -m bench.semi_structured [--json]

Weights of Llama-3-8B's shapes in bf16, inputs of 1 to 16,384 tokens; medians. The product is checked against the dense one.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from torch.sparse import to_sparse_semi_structured

SHAPES = {"attention": (4096, 4096), "up projection": (14336, 4096), "down projection": (4096, 14336)}
TOKENS = (1, 16, 128, 1024, 4096, 16384)


def milliseconds(run: Any) -> float:
    """Median of 20 runs, after 5."""
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def stored_bytes(sparse: Any) -> int:
    """Of everything that a semi-structured weight keeps."""
    parts = {id(one): one for name in sparse.__slots__ if isinstance(one := getattr(sparse, name, None), torch.Tensor)}
    return sum(one.nbytes for one in parts.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device", file=sys.stderr)
        return 0
    out: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "shapes": {}}
    torch.manual_seed(0)
    for name, (rows, columns) in SHAPES.items():
        weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
        smallest = weight.abs().view(-1, 4).argsort(dim=1)[:, :2]
        dense = weight.view(-1, 4).scatter(1, smallest, 0).view(rows, columns)
        sparse = to_sparse_semi_structured(dense)
        figures: dict[str, Any] = {"dense_bytes": dense.nbytes, "sparse_bytes": stored_bytes(sparse), "tokens": {}}
        for tokens in TOKENS:
            inputs = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
            expected = torch.nn.functional.linear(inputs, dense)
            found = torch.nn.functional.linear(inputs, sparse)
            error = float((found - expected).float().norm() / expected.float().norm())
            assert error < 0.01, f"the products differ by {error}"
            pair = {
                "dense_ms": milliseconds(lambda x=inputs, w=dense: torch.nn.functional.linear(x, w)),
                "sparse_ms": milliseconds(lambda x=inputs, w=sparse: torch.nn.functional.linear(x, w)),
            }
            figures["tokens"][tokens] = pair | {"gain": pair["dense_ms"] / pair["sparse_ms"]}
            if not given.json:
                print(name, tokens, json.dumps(figures["tokens"][tokens]), flush=True)
        out["shapes"][name] = figures
    if given.json:
        print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
