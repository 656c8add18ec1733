"""The memory in which a checkpoint of codes is opened."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.stored_forms import WEIGHT, write_checkpoint

_MEASURED = """
import resource, sys
from pathlib import Path
from nightpress.core.compress.executors.open_source import open_source
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
open_source(Path(sys.argv[1]), Path(sys.argv[2]), lambda _fraction, _what: None)
print((peak() - before) // 1024)
"""


@pytest.mark.slow
def test_opening_holds_a_chunk_and_never_a_whole_weight(tmp_path: Path) -> None:
    """128 MiB of codes, 256 MiB of bfloat16, 512 MiB of float32."""
    codes, scales = torch.ones(8192, 16384, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.ones(64, 128)
    tensors = {WEIGHT: codes, f"{WEIGHT}_scale_inv": scales}
    folder = write_checkpoint(tmp_path / "m", tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    command = [sys.executable, "-c", _MEASURED, str(folder), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250, "MiB more than before"
