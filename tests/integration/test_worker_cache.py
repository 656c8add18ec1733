"""The worker's cache: it holds only right bytes, is bounded, and is shared by workers that may be killed at any time."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nightpress.core.errors import NightpressError
from nightpress.worker.cache import BlobCache, stage_in_place
from tests.patience import slowness
from tests.service import Service


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def writing(data: bytes, calls: list[Path] | None = None) -> Callable[[Path], None]:
    def fetch(path: Path) -> None:
        if calls is not None:
            calls.append(path)
        path.write_bytes(data)

    return fetch


def take(cache: BlobCache, data: bytes, target: Path, calls: list[Path] | None = None) -> None:
    cache.take(sha256(data), len(data), target, writing(data, calls), on_bytes=lambda _: None)


def test_a_blob_is_fetched_once_and_handed_out_read_only(tmp_path: Path) -> None:
    cache, calls = BlobCache(tmp_path / "cache", 1000), []
    take(cache, b"one", tmp_path / "a", calls)
    take(cache, b"one", tmp_path / "b", calls)
    assert len(calls) == 1
    assert (tmp_path / "b").read_bytes() == b"one"
    assert (tmp_path / "b").stat().st_mode & 0o222 == 0


def test_a_damaged_blob_is_noticed_and_fetched_again(tmp_path: Path) -> None:
    cache, calls = BlobCache(tmp_path / "cache", 1000), []
    take(cache, b"one", tmp_path / "a", calls)
    (blob,) = (tmp_path / "cache" / "blobs").iterdir()
    blob.chmod(0o644)
    (tmp_path / "a").unlink()
    blob.write_bytes(b"two")
    take(cache, b"one", tmp_path / "b", calls)
    assert len(calls) == 2
    assert (tmp_path / "b").read_bytes() == b"one"


def test_the_blob_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 250)
    for index, name in enumerate("abc"):
        data = name.encode() * 100
        take(cache, data, tmp_path / name)
        (tmp_path / name).unlink()
        blob = tmp_path / "cache" / "blobs" / sha256(data)
        os.utime(blob, (index, index))
    kept = {path.name for path in (tmp_path / "cache" / "blobs").iterdir()}
    assert kept == {sha256(b"b" * 100), sha256(b"c" * 100)}


def test_a_blob_larger_than_the_cache_goes_past_it(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 10)
    take(cache, b"x" * 100, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"x" * 100
    assert not list((tmp_path / "cache" / "blobs").iterdir())


def test_a_fetch_that_fails_leaves_nothing_that_counts(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 1000)

    def breaks(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("cut")

    with pytest.raises(OSError, match="cut"):
        cache.take(sha256(b"whole"), 5, tmp_path / "a", breaks, on_bytes=lambda _: None)
    assert not (tmp_path / "a").exists()
    BlobCache(tmp_path / "cache", 1000)  # the next worker removes partial files
    assert not list((tmp_path / "cache" / "blobs").iterdir())


def test_two_that_want_the_same_blob_fetch_it_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    started = threading.Barrier(4)

    def want(index: int) -> None:
        cache = BlobCache(tmp_path / "cache", 10_000)
        started.wait()
        take(cache, b"shared" * 100, tmp_path / str(index), calls)

    threads = [threading.Thread(target=want, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all((tmp_path / str(index)).read_bytes() == b"shared" * 100 for index in range(4))


def test_a_worker_that_is_killed_while_it_fetches_holds_up_no_other(tmp_path: Path) -> None:
    """A real process is killed while it fetches a blob: its lock ends with it, and the partial blob does not count."""
    script = (
        "import sys, time; from pathlib import Path; from nightpress.worker.cache import BlobCache\n"
        "def fetch(path):\n path.write_bytes(b'who'); print('fetching', flush=True); time.sleep(600)\n"
        f"cache = BlobCache(Path({str(tmp_path / 'cache')!r}), 1000)\n"
        f"cache.take({sha256(b'whole')!r}, 5, Path({str(tmp_path / 'a')!r}), fetch, on_bytes=lambda _: None)"
    )
    calls: list[Path] = []
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "fetching\n"
        cache = BlobCache(tmp_path / "cache", 1000)
        waits = threading.Thread(target=take, args=(cache, b"whole", tmp_path / "b", calls))
        waits.start()
        waits.join(0.2)
        assert waits.is_alive(), "it waits for the other's download"
        process.kill()
        waits.join(10 * slowness())
    assert (tmp_path / "b").read_bytes() == b"whole"
    assert len(calls) == 1


@pytest.mark.slow
def test_six_jobs_on_one_model_download_it_once(tmp_path: Path, sqlite_url: str) -> None:
    """Two workers on one host, each with its own cache object on the same folder."""
    service = Service(tmp_path, sqlite_url)
    fetched: list[str] = []
    get_file = service.objects.get_file

    def counted(key: str, *args: Any, **more: Any) -> None:
        fetched.append(key)
        get_file(key, *args, **more)

    service.objects.get_file = counted  # type: ignore[method-assign]
    jobs = [service.submit() for _ in range(6)]
    workers = [service.slot("press") for _ in range(2)]
    threads = [threading.Thread(target=slot.serve) for slot, _ in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {service.job(job_id).state for job_id in jobs} == {"succeeded"}
    assert len({service.job(job_id).worker_id for job_id in jobs}) == 2
    assert sorted(fetched) == [f"models/{service.model_id}/{name}" for name in ("config.json", "model.safetensors")]
    service.close()


@pytest.mark.parametrize("link", [True, False])
def test_a_file_in_place_must_be_the_one_that_was_registered(tmp_path: Path, link: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"changed!")
    with pytest.raises(NightpressError, match="other bytes"):
        stage_in_place(source, sha256(b"original"), 8, target, link=link, on_bytes=lambda _: None)
    assert not target.exists()
    stage_in_place(source, sha256(b"changed!"), 8, target, link=link, on_bytes=lambda _: None)
    assert target.read_bytes() == b"changed!"
