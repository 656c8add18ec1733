"""Forks ranks from one process that has imported the core: `python -m nightpress.core.compress.ranks.nursery FD`. See forks.py.

Importing torch, transformers and the core takes seconds of processor time, which each rank would spend again. This process imports them and
forks ranks by the loop of runners/nursery.py. Each message names the GPU that a fork sees, as CUDA_VISIBLE_DEVICES does, or is `cpu`. It
carries two file descriptors: the fork's connection to its starter, and a socket for its end. The fork's process id is written there, and later
its status.
"""

import gc
import importlib
import os
import sys

from nightpress.core.compress.ranks import member
from nightpress.core.compress.runners.nursery import can_use_no_gpu, import_libraries, serve

#: What a rank's first task would import besides. By name: nothing here uses these modules, and the core is above this package.
_IMPORTED = ("torch.distributed", "transformers.generation", "nightpress.core.compress.passes")


def main() -> None:
    import_libraries()
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    serve(int(sys.argv[1]), _become_rank, tells_pid=True)


def _become_rank(visible: bytes, given: list[int]) -> None:
    (connection,) = given
    os.closerange(3, connection)
    os.closerange(connection + 1, os.sysconf("SC_OPEN_MAX"))
    if visible != b"cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.decode()
        if can_use_no_gpu():
            os.set_inheritable(connection, True)
            os.execv(sys.executable, [sys.executable, "-P", "-m", member.__name__, str(connection)])  # noqa: S606 - it is this interpreter
    gc.enable()
    member.main(connection)


if __name__ == "__main__":
    main()
