"""Run every bench and print one table: what was claimed, what was measured, beside what. `python -m bench [NAME …]`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

OUT = Path(__file__).parent / "out"
#: in this order: the quiet ones that time milliseconds first
BENCHES = (
    "startup",
    "submit",
    "queue",
    "streams",
    "web",
    "recovery",
    "storage",
    "stream",
    "encoder",
    "static_int8",
    "targets",
    "shrink",
    "overhead",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="all, if none is named")
    chosen = parser.parse_args().names or BENCHES
    OUT.mkdir(exist_ok=True)
    failed = []
    for name in chosen:
        print(f"== {name}", flush=True)
        run = subprocess.run([sys.executable, "-m", f"bench.{name}", "--json"], stdout=subprocess.PIPE, text=True)
        if run.returncode:
            failed.append(name)
            continue
        (OUT / f"{name}.json").write_text(run.stdout)
        print(json.dumps(json.loads(run.stdout), indent=1), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
