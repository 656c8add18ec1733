"""What the kernel counts for this process's own control group: a worker's container or service, with the children of its jobs."""

from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


def oom_kills(mount: Path = _MOUNT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """How many processes of the group the kernel has ended for want of memory; 0 where it keeps no such count.

    A count of the whole host would hold others' processes: a job that somebody killed would be told that it took too much memory.
    """
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return 0
    for _, controllers, path in groups:
        if controllers == "":  # version 2: one tree for all controllers
            found = _count(mount / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            found = _count(mount / "memory" / path.lstrip("/") / "memory.oom_control")
        else:
            continue
        if found is not None:
            return found
    return 0


def _count(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)
