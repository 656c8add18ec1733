"""Children that misbehave on purpose: the real child process, which runs a function of this file instead of the pipeline.

`python tests/children.py BEHAVIOUR …` takes the arguments of `python -m nightpress.worker.child …` after the behaviour's name.
"""

import ctypes
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.handoff.frames import Checkpoint, Frame, Log, Progress
from nightpress.core.handoff.manifest import ArtifactEntry, Manifest, describe_file
from nightpress.core.handoff.report import Report, Subject
from nightpress.core.handoff.source_outputs import FRESH_FILE, KEPT_FILE, MAX_BYTES
from nightpress.core.handoff.spec import JobSpec
from nightpress.worker.child import main
from tests.patience import slowness
from tests.spy import look_around
from tests.trials import bits_of, plain_report, report_of

Emit = Callable[[Frame], None]


def press(job_dir: Path, emit: Emit, source: Subject | None = None, report: Report | None = None) -> Manifest:
    """Write a whole result at once: unchanged copies of the source's files, and a report with the job's folder and thread count.

    report: another report to write; then the result is a copy of the source's config.
    """
    spec = JobSpec.load(job_dir)
    emit(Progress(phase="pressing", fraction=0.5))
    out = job_dir / "out"
    (out / "onnx").mkdir()
    for file in sorted((job_dir / "source").glob("*" if report is None else "config.json")):
        (out / "onnx" / file.name).write_bytes(file.read_bytes())
    report = report or plain_report(spec, job_dir.name, source)
    (out / "report.json").write_text(report.model_dump_json())
    files = tuple(describe_file(out / "onnx", path) for path in sorted((out / "onnx").iterdir()))
    manifest = Manifest(
        job_id=spec.job_id,
        attempt=spec.attempt,
        verdict=report.verdict,
        artifacts=(ArtifactEntry(format="onnx", path="onnx", files=files, consumer="none"),),
        report=(describe_file(out, out / "report.json"),),
    )
    (out / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def tells_its_share(job_dir: Path, emit: Emit) -> Manifest:
    """Log the GPUs, threads and memory that the job may use, and take so long that jobs overlap."""
    spec = JobSpec.load(job_dir)
    share = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": spec.threads, "memory": spec.memory_limit}
    emit(Log(text=json.dumps(share)))
    time.sleep(1.5)
    return press(job_dir, emit)


def measures(job_dir: Path, emit: Emit) -> Manifest:
    """Measure the source, as far as the worker can see: leave a file, or say in the report what the file of an earlier job holds."""
    spec = JobSpec.load(job_dir)
    kept, told = job_dir / "work" / KEPT_FILE, ""
    if spec.source_measured_by:
        told = kept.read_text()
    else:
        assert not kept.exists()
        if spec.keep_source:
            (job_dir / "work" / FRESH_FILE).write_text(f"measured by {spec.job_id}")
    by = spec.source_measured_by or None
    return press(
        job_dir,
        emit,
        Subject(name="source", format="safetensors", size_bytes=1, measurements_by=by, notes=(told,) if told else ()),
    )


def measures_and_fails(job_dir: Path, emit: Emit) -> Manifest:
    measures(job_dir, emit)
    raise NightpressError(ErrorCode.VERIFICATION_FAILED, "The artifact is broken.")


def measures_a_link(job_dir: Path, emit: Emit) -> Manifest:
    """Leave a link to a file outside the folder."""
    (job_dir / "work" / FRESH_FILE).symlink_to("/etc/hostname")
    return press(job_dir, emit)


def measures_a_pipe(job_dir: Path, emit: Emit) -> Manifest:
    """Leave a pipe, from which a reader would wait for ever."""
    os.mkfifo(job_dir / "work" / FRESH_FILE)
    return press(job_dir, emit)


def measures_too_much(job_dir: Path, emit: Emit) -> Manifest:
    """Leave a file that is larger than is kept. It takes no room on the disk."""
    with (job_dir / "work" / FRESH_FILE).open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    return press(job_dir, emit)


def slow(job_dir: Path, emit: Emit) -> Manifest:
    """Make steady progress for four seconds and log each step."""
    for step in range(40):
        emit(Log(text=f"step {step}"))
        emit(Progress(phase="pressing", fraction=step / 80, message=f"step {step}"))
        time.sleep(0.1)
    return press(job_dir, emit)


def first_slow(job_dir: Path, emit: Emit) -> Manifest:
    """The first attempt never ends. The second ends at once."""
    if JobSpec.load(job_dir).attempt == 1:
        return endless(job_dir, emit)
    return press(job_dir, emit)


def endless(job_dir: Path, emit: Emit) -> Manifest:
    """Store a checkpoint, then make progress for ever. Starts two processes: a grandchild, and an orphaned daemon in its own session."""
    consumer = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
    daemon = subprocess.run(
        ["sh", "-c", "setsid sleep 600 >&2 & echo $!"], stdout=subprocess.PIPE, text=True, check=True
    )
    seen_in = Path("/proc/self/ns/pid").readlink()
    emit(Log(text=f"pid {os.getpid()} consumer {consumer.pid} daemon {daemon.stdout.strip()} in {seen_in}"))
    (job_dir / "work" / "one").write_text("so far")
    emit(Checkpoint(path="one", step=1))
    step = 0
    while True:
        step += 1
        emit(Progress(phase="pressing", fraction=0.5, message=f"step {step}"))
        time.sleep(0.1)


def stepping(job_dir: Path, emit: Emit) -> Manifest:
    """Five steps. Each leaves a file, from which the next attempt resumes. With `:N`, the first attempt hangs after step N."""
    stop_at = int(sys.argv[1].partition(":")[2] or 0) if JobSpec.load(job_dir).attempt == 1 else 0
    work = job_dir / "work"
    for step in range(1, 6):
        if (work / f"step-{step}").exists():
            continue
        emit(Log(text=f"doing step {step}"))
        for name, text in ((f"step-{step}", f"step {step}\n"), ("state", "." * step * 1000)):
            (work / "new").write_text(text)
            (work / "new").rename(work / name)
            emit(Checkpoint(path=name, step=step))
        if step == stop_at:
            emit(Log(text="waiting"))
            while True:
                emit(Progress(phase="pressing", fraction=0.5, message=f"waiting since {time.monotonic()}"))
                time.sleep(0.1)
    return press(job_dir, emit)


def chaotic(job_dir: Path, emit: Emit) -> Manifest:
    """A random number of steps of random length, each with a checkpoint; sometimes a crash or an error. Job and attempt are the seed.

    A study's trial ends with figures that its recipe alone decides, and has no error that ends it.
    """
    spec = JobSpec.load(job_dir)
    dice = random.Random(f"{spec.job_id} {spec.attempt}")
    work, fate = job_dir / "work", dice.random()
    for step in range(1, dice.randint(1, 8)):
        if (work / f"step-{step}").exists():
            continue
        time.sleep(dice.uniform(0.0, 0.6))
        emit(Progress(phase="pressing", fraction=step / 10, message=f"step {step}"))
        (work / "new").write_bytes(dice.randbytes(1000))
        (work / "new").rename(work / f"step-{step}")
        emit(Checkpoint(path=f"step-{step}", step=step))
    if fate < 0.08:
        return segfault(job_dir, emit)
    if fate < 0.16:
        return leave(job_dir, emit)
    if "cosine" in spec.recipe.gates:
        recipe = spec.recipe.model_dump(mode="json")
        return press(job_dir, emit, report=report_of(spec.job_id, recipe, *bits_of(recipe)))
    if fate < 0.22:
        raise NightpressError(ErrorCode.NUMERICAL_FAILURE, "A weight is no number.")
    return press(job_dir, emit)


def pipeline_until(job_dir: Path, emit: Emit) -> Manifest:
    """The real pipeline. With `:N`, the first attempt hangs after block N of its second pass."""
    from nightpress.core.compress import pipeline

    stop_at = int(sys.argv[1].partition(":")[2]) if JobSpec.load(job_dir).attempt == 1 else 0

    def emit_until(frame: Frame) -> None:
        emit(frame)
        last = isinstance(frame, Checkpoint) and (frame.pass_index, frame.step) == (1, stop_at)
        while last and frame.path.endswith(".json"):
            emit(Progress(phase="pressing", fraction=0.4, message=f"waiting since {time.monotonic()}"))
            time.sleep(0.1)

    return pipeline.run(job_dir, emit_until)


def pipeline_until_said(job_dir: Path, emit: Emit) -> Manifest:
    """The real pipeline. With `:TEXT`, the first attempt hangs at the first message or checkpoint path that contains TEXT."""
    from nightpress.core.compress import pipeline

    text = sys.argv[1].partition(":")[2]
    stops = JobSpec.load(job_dir).attempt == 1

    def emit_until(frame: Frame) -> None:
        emit(frame)
        said = frame.message if isinstance(frame, Progress) else frame.path if isinstance(frame, Checkpoint) else ""
        if stops and text in said:
            emit(Log(text="waiting"))
            while True:
                emit(Progress(phase="exporting", fraction=0.5, message=f"waiting since {time.monotonic()}"))
                time.sleep(0.1)

    return pipeline.run(job_dir, emit_until)


def telling(job_dir: Path, emit: Emit) -> Manifest:
    """The real pipeline, which also writes each progress message to the job's log."""
    from nightpress.core.compress import pipeline

    def emit_and_tell(frame: Frame) -> None:
        emit(frame)
        if isinstance(frame, Progress):
            emit(Log(text=f"told: {frame.message}"))

    return pipeline.run(job_dir, emit_and_tell)


def staying(job_dir: Path, emit: Emit) -> Manifest:
    """With `:PHASE`, go through the phases up to PHASE and stay in it."""
    last = sys.argv[1].partition(":")[2]
    for phase in ("validating", "baseline", "pressing", "exporting", "verifying", "evaluating"):
        emit(Progress.model_validate({"phase": phase, "fraction": 0.5}))
        if phase == last:
            break
    while True:
        emit(Progress.model_validate({"phase": last, "fraction": 0.5, "message": f"since {time.monotonic()}"}))
        time.sleep(0.1)


def wedged(job_dir: Path, emit: Emit) -> Manifest:
    """Send frames for ever, but make no progress."""
    while True:
        emit(Progress(phase="pressing", fraction=0.5, message="the same"))
        time.sleep(0.05)


def segfault(job_dir: Path, emit: Emit) -> Manifest:
    ctypes.string_at(0)
    raise AssertionError


def nameless_signal(job_dir: Path, emit: Emit) -> Manifest:
    os.kill(os.getpid(), signal.SIGRTMIN + 1)
    raise AssertionError


def leave(job_dir: Path, emit: Emit) -> Manifest:
    os._exit(3)


def full_disk(job_dir: Path, emit: Emit) -> Manifest:
    raise OSError(errno.ENOSPC, "No space left on device")


def hog(job_dir: Path, emit: Emit) -> Manifest:
    """Start a process that takes 400 MiB, more than the worker offers."""
    code = "import time; held = bytearray(400 * 1024**2); time.sleep(60)"
    subprocess.run([sys.executable, "-S", "-c", code], stdin=subprocess.DEVNULL, check=True)
    raise AssertionError


def killed_at_its_limit(job_dir: Path, emit: Emit) -> Manifest:
    """Take nearly all the memory of the limit, then end by SIGKILL, as the kernel's OOM killer ends a process."""
    # The child's two processes take the other 65 MiB.
    held = bytearray(JobSpec.load(job_dir).memory_limit * 95 // 100 - 65 * 1024**2)
    time.sleep(1.2 * slowness())  # until the supervisor has measured the memory
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(len(held))


def one_of_several_killed_at_its_limit(job_dir: Path, emit: Emit) -> Manifest:
    """Take nearly all the memory of the limit, then report that one of several processes was killed."""
    held = bytearray(JobSpec.load(job_dir).memory_limit * 95 // 100 - 65 * 1024**2)
    time.sleep(1.2 * slowness())  # until the supervisor has measured the memory
    what = f"Process 2 of the 2 that compute the model was ended by signal 9, {len(held)} bytes."
    raise NightpressError(ErrorCode.WORKER_LOST, what, signal=signal.SIGKILL)


def killed_by_somebody(job_dir: Path, emit: Emit) -> Manifest:
    """End by SIGKILL, as the kernel's OOM killer ends a process, but with little memory taken."""
    time.sleep(4 * slowness())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def out_of_addresses(job_dir: Path, emit: Emit) -> Manifest:
    resource.setrlimit(resource.RLIMIT_AS, (512 * 1024**2,) * 2)
    raise AssertionError(len(bytearray(1024**3)))


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's exception."""


def cuda_out_of_memory(job_dir: Path, emit: Emit) -> Manifest:
    raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore lines.")


def fills_the_gpu(job_dir: Path, emit: Emit) -> Manifest:
    import torch

    held = [torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(10_000)]
    raise AssertionError(len(held))


def killed_on_the_gpu(job_dir: Path, emit: Emit) -> Manifest:
    import torch

    held = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(held)


def smuggle(job_dir: Path, emit: Emit) -> Manifest:
    """A result with a symbolic link to a file outside its folder."""
    manifest = press(job_dir, emit)
    path = job_dir / "out" / "onnx" / manifest.artifacts[0].files[0].path
    path.unlink()
    path.symlink_to("/etc/passwd")
    return manifest


def tamper(job_dir: Path, emit: Emit) -> Manifest:
    """A result whose bytes differ from its manifest's hashes."""
    manifest = press(job_dir, emit)
    path = job_dir / "out" / "onnx" / manifest.artifacts[0].files[0].path
    path.write_bytes(bytes(path.stat().st_size))
    return manifest


def babble(job_dir: Path, emit: Emit) -> Manifest:
    """Send invalid frames and a very long line, and write to standard output and standard error."""
    os.write(3, b"not json\n" + b"x" * 300_000 + b"\n" + b'{"frame": "progress", "phase": "conquest"}\n')
    sys.stdout.write("said on standard output\n")
    sys.stderr.write("said on standard error\n")
    emit(Log(text="said \x1b[31min a frame\x00"))
    return press(job_dir, emit)


def spy(job_dir: Path, emit: Emit) -> Manifest:
    """Try to reach everything outside the sandbox, and log what succeeded."""
    found = look_around(job_dir, json.loads(sys.argv[1].partition(":")[2]))
    emit(Log(text=json.dumps(found)))
    return press(job_dir, emit)


def hides_memory(job_dir: Path, emit: Emit) -> Manifest:
    """Take 800 MiB, more than the worker offers, in deleted files of /dev/shm that no process maps."""
    held = []
    for at in range(8):
        path = Path(f"/dev/shm/{at}")
        held.append(path.open("wb"))
        path.unlink()
        held[-1].write(bytes(100 * 1024**2))
    time.sleep(20)
    raise AssertionError(held)


def long_file(job_dir: Path, emit: Emit) -> Manifest:
    """Make a sparse file of 4 TiB, longer than the disk."""
    with (job_dir / "work" / "long").open("wb") as stream:
        stream.truncate(1 << 42)
    raise AssertionError


BEHAVIOURS = {
    behaviour.__name__: behaviour
    for behaviour in (
        press, tells_its_share, slow, first_slow, endless, stepping, chaotic, pipeline_until, pipeline_until_said, telling, staying, wedged, segfault, nameless_signal, leave, killed_at_its_limit, one_of_several_killed_at_its_limit, killed_by_somebody, out_of_addresses, cuda_out_of_memory,
        measures, measures_and_fails, measures_a_link, measures_a_pipe, measures_too_much,
        fills_the_gpu, killed_on_the_gpu, full_disk, hog, smuggle, tamper, babble, spy, hides_memory, long_file
    )
}  # fmt: skip

if __name__ == "__main__":
    name = sys.argv[1].split(":")[0]
    main(sys.argv[2:], load=lambda _: BEHAVIOURS[name])
