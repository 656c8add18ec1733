"""Converts pickled checkpoints inside a job's walls: `python -m nightpress.worker.confined FOLDER`.

Reads FOLDER/source, writes FOLDER/out. The last line on standard output is JSON: `{}`, or the error.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from nightpress.core.errors import NightpressError
from nightpress.core.handoff.spec import OUT_DIR, SOURCE_DIR
from nightpress.worker import sandbox
from nightpress.worker.enclosure import enclose
from nightpress.worker.walls import Walls


def main() -> NoReturn:
    folder = Path(sys.argv[1]).resolve()
    environment = sandbox.child_environment(folder, os.cpu_count() or 1)
    os.environ.clear()
    os.environ.update(environment)
    sandbox.limit_resources()
    sandbox.adopt_orphans()

    def work(walls: Walls) -> NoReturn:
        if walls.down:
            print(f"For this conversion, this is {walls}", file=sys.stderr)  # noqa: T201
        said: dict[str, object] = {}
        try:
            from nightpress.core.compress.convert.pickles import unpickle

            unpickle(folder / SOURCE_DIR, folder / OUT_DIR)
        except NightpressError as error:
            said = error.as_dict()
        except BaseException:
            traceback.print_exc()
            os._exit(os.EX_SOFTWARE)
        print(json.dumps(said), flush=True)  # noqa: T201
        os._exit(0)

    status = enclose(folder, work, network=False).wait()
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else os.EX_SOFTWARE)


if __name__ == "__main__":
    main()
