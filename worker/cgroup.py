"""The kernel's counters for this process's own control group: the worker's container or service, including the children of its jobs."""

from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


def oom_kills(mount: Path = _MOUNT, membership: Path = Path("/proc/self/cgroup")) -> int:
    """The number of processes of the group that the kernel has killed for lack of memory; 0 if the kernel has no such counter.

    The counter of the whole host would include other processes: a job that was killed for another reason would then be reported as
    out of memory.
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
