"""Benches count the CPU time of a whole tree of processes, both running and ended."""

import subprocess
import sys

import pytest

from bench.processes import cpu_seconds

_BURN = "import time\nwhile time.process_time() < 0.5: pass\n"
#: An outer process like that of a job's child: it does no work itself; a process two levels below does.
_OUTER = """
import subprocess, sys
inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]]); print('burnt', flush=True); sys.stdin.read()"
subprocess.run([sys.executable, "-c", inner, sys.argv[1]])
print("collected", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_what_processes_below_have_used_counts_before_and_after_they_end():
    command = [sys.executable, "-c", _OUTER, _BURN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout
        assert outer.stdin
        assert outer.stdout.readline() == "burnt\n"
        used = cpu_seconds(outer.pid)
        assert used >= 0.5
        outer.stdin.close()
        assert outer.stdout.readline() == "collected\n"
        assert cpu_seconds(outer.pid) == pytest.approx(used, abs=0.3)
        outer.kill()
