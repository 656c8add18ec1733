"""Quantizes matrices with ggml's own code, from the library that llama-cpp-python installs. The argument is the number of threads.

It reads requests from standard input until that ends: a line of JSON, then float32 numbers, first the importance of each column, then the
matrix. For each it writes the matrix's blocks to standard output.
"""

import ctypes
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def load() -> Any:
    """ggml's library. Raises ModuleNotFoundError or OSError."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("llama-cpp-python is not installed")
    (path,) = [path for path in (Path(spec.origin).parent / "lib").iterdir() if path.stem == "libggml-base"]
    library = ctypes.CDLL(str(path))
    number, floats = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, number, number, number, floats]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(library: Any, asked: dict[str, Any], pool: ThreadPoolExecutor, threads: int) -> bytes:
    rows, columns = asked["rows"], asked["columns"]
    importance = _floats(columns)
    matrix = _floats(rows * columns)
    blocks = ctypes.create_string_buffer(rows * asked["row_bytes"])
    library.ggml_quantize_init(asked["type"])
    step = -(-rows // threads)

    def part(first: int) -> int:
        count = min(step, rows - first)
        at = first * columns  # ggml moves both pointers by the rows before this number
        done: int = library.ggml_quantize_chunk(asked["type"], matrix, blocks, at, count, columns, importance)
        return done

    written = sum(pool.map(part, range(0, rows, step)))
    if written != len(blocks.raw):
        raise RuntimeError(f"ggml wrote {written} bytes in place of {len(blocks.raw)}")
    return blocks.raw


def _floats(count: int) -> Any:
    numbers = sys.stdin.buffer.read(4 * count)
    if len(numbers) != 4 * count:
        raise EOFError("the numbers of a matrix are missing")
    return ctypes.create_string_buffer(numbers, 4 * count)


if __name__ == "__main__":
    threads = int(sys.argv[1])
    library = load()
    with ThreadPoolExecutor(threads) as pool:
        for line in iter(sys.stdin.buffer.readline, b""):
            sys.stdout.buffer.write(quantize(library, json.loads(line), pool, threads))
            sys.stdout.buffer.flush()
