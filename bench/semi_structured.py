"""2:4 sparsity on a GPU: torch's semi-structured matrix product beside the dense product, and the size of its weights.

    python -m bench.semi_structured

The weights have Llama-3-8B's shapes, in bf16; inputs have 1 to 16,384 tokens. Times are medians. The product is checked against the dense
one.
"""

import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.sparse import to_sparse_semi_structured

from bench.record import Figure, finish, make_parser

SHAPES = {"attention": (4096, 4096), "up projection": (14336, 4096), "down projection": (4096, 14336)}
TOKENS = (1, 16, 128, 1024, 4096, 16384)


def milliseconds(run: Any) -> float:
    """The median of 20 runs, after 5 warm-up runs."""
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times[5:]))


def stored_bytes(sparse: Any) -> int:
    """The bytes of all tensors that a semi-structured weight holds."""
    parts = [getattr(sparse, name, None) for name in sparse.__slots__]
    return sum({id(part): part.nbytes for part in parts if isinstance(part, torch.Tensor)}.values())


def main() -> int:
    parser = make_parser("semi_structured", __doc__)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device", file=sys.stderr)
        return 0
    torch.manual_seed(0)
    figures = [figure for name, shape in SHAPES.items() for figure in measure(name, *shape)]
    return finish("semi_structured", figures, parser, options)


def measure(name: str, rows: int, columns: int) -> Iterator[Figure]:
    """Measure a weight [rows, columns] in bfloat16, with inputs of each number of tokens."""
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    smallest = weight.abs().view(-1, 4).argsort(dim=1)[:, :2]
    dense = weight.view(-1, 4).scatter(1, smallest, 0).view(rows, columns)
    sparse = to_sparse_semi_structured(dense)
    yield Figure(f"bytes/{name}/dense", dense.nbytes / 1e6, "MB")
    yield Figure(f"bytes/{name}/sparse", stored_bytes(sparse) / 1e6, "MB")
    for tokens in TOKENS:
        inputs = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
        expected = torch.nn.functional.linear(inputs, dense)
        found = torch.nn.functional.linear(inputs, sparse)
        error = float((found - expected).float().norm() / expected.float().norm())
        assert error < 0.01, f"the products differ by {error}"
        dense_ms = milliseconds(lambda x=inputs: torch.nn.functional.linear(x, dense))
        sparse_ms = milliseconds(lambda x=inputs: torch.nn.functional.linear(x, sparse))
        row = f"{name}/{tokens} tokens"
        yield Figure(f"{row}/dense", round(dense_ms, 4), "ms")
        yield Figure(f"{row}/sparse", round(sparse_ms, 4), "ms")
        yield Figure(f"{row}/gain", round(dense_ms / sparse_ms, 2), "× as fast as dense")


if __name__ == "__main__":
    sys.exit(main())
