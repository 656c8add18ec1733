"""Deliveries of 1 GB to a bucket, the Hub and a registry, beside what each one's own library takes; and ticks with many rows.

    python -m bench.deliveries [--size-mb 1024] [--pairs 3] [--rows 10000]

Each pair delivers new bytes from a local object store, and uploads as many new bytes from a local file by boto3 (as tuned for
`bench.storage`), by huggingface_hub's `create_commit`, and by oras' `push`, in alternating order, to the same real S3 server, the tests' own
imitation of the Hub, and Debian's docker-registry. The bar: at least 0.8 of the library's speed.

A tick looks for due deliveries on PostgreSQL, with as many rows and with ten. The bar: at most 1.2 times as long, for the noise of values
about a millisecond.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from boto3.s3.transfer import TransferConfig
from huggingface_hub import CommitOperationAdd, HfApi
from sqlalchemy import insert

from bench.record import Figure, finish, make_parser
from nightpress.core.database import db_now, transaction
from nightpress.core.ids import new_id
from nightpress.core.service.tables.deliveries import deliveries
from tests.databases import migrated_postgres, migrated_sqlite
from tests.deliveries import TENANT, World
from tests.hub import serve_hub
from tests.oci import PASSWORD, PROGRAM, USER, Registry
from tests.servers import S3, Postgres

MIB = 1024**2
Upload = Callable[[Path], object]


def main() -> int:
    parser = make_parser("deliveries", __doc__)
    parser.add_argument("--size-mb", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=10_000)
    options = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, place in (("bucket", to_bucket), ("hub", to_hub), ("registry", to_registry)):
            if kind == "registry" and PROGRAM is None:
                print("docker-registry is not installed: no deliveries to a registry")
                continue
            with place(Path(folder) / kind) as (world, url, theirs):
                figures += compare(kind, world, url, theirs, options.size_mb * MIB, options.pairs)
        with Postgres(Path(folder) / "postgres") as server:
            figures += ticks(Path(folder), server, options.rows)
    return finish("deliveries", figures, parser, options)


# Speed ---------------------------------------------------------------------------------------------------------------


def compare(kind: str, world: World, url: str, theirs: Upload, size: int, pairs: int) -> list[Figure]:
    ours_mbs, theirs_mbs = [], []
    for pair in range(pairs):
        for mine in (True, False) if pair % 2 == 0 else (False, True):
            data = os.urandom(size)
            if mine:
                world.accept({"onnx": {"model.onnx": data}}, destinations=[url.format(pair=pair)])
                del data
                began = time.perf_counter()
                done = world.run()
                ours_mbs.append(size / 1e6 / (time.perf_counter() - began))
                assert done.state == "delivered", done
            else:
                with tempfile.TemporaryDirectory() as folder:
                    file = Path(folder) / "model.onnx"
                    file.write_bytes(data)
                    del data
                    began = time.perf_counter()
                    theirs(file)
                    theirs_mbs.append(size / 1e6 / (time.perf_counter() - began))
    ratios = [ours / other for ours, other in zip(ours_mbs, theirs_mbs, strict=True)]
    return [
        Figure(f"{kind}/ours", round(statistics.median(ours_mbs)), "MB/s"),
        Figure(f"{kind}/library", round(statistics.median(theirs_mbs)), "MB/s"),
        Figure(
            f"{kind}/ratio",
            round(statistics.median(ratios), 2),
            spread=(round(min(ratios), 2), round(max(ratios), 2)),
            bar=">= 0.8",
        ),
    ]


@contextmanager
def to_bucket(folder: Path) -> Iterator[tuple[World, str, Upload]]:
    with ExitStack() as stack:
        server = stack.enter_context(S3(folder / "s3"))
        bucket = server.create_bucket()
        world = open_world(stack, folder, f"s3://{bucket}", destination_s3_endpoint_url=server.endpoint)
        world.credentials(f"s3://{bucket}", access_key_id=server.access_key, secret_access_key=server.secret_key)
        config = TransferConfig(multipart_threshold=16 * MIB, multipart_chunksize=16 * MIB, max_concurrency=8)
        client = server.client()
        yield (
            world,
            f"s3://{bucket}/ours/{{pair}}",
            lambda file: client.upload_file(str(file), bucket, f"theirs/{new_id('x')}", Config=config),
        )


@contextmanager
def to_hub(folder: Path) -> Iterator[tuple[World, str, Upload]]:
    with ExitStack() as stack:
        hub = stack.enter_context(serve_hub())
        world = open_world(stack, folder, "hf://acme", hub_endpoint=hub.url)
        world.credentials("hf://acme", token="hf_bench")
        api = HfApi(endpoint=hub.url, token="hf_bench")
        api.create_repo("acme/theirs")

        def commit(file: Path) -> None:
            api.create_commit("acme/theirs", [CommitOperationAdd("model.onnx", str(file))], commit_message="bench")
            hub.writes.lfs.clear()  # the imitation keeps all bytes in memory

        yield world, "hf://acme/ours-{pair}", commit


@contextmanager
def to_registry(folder: Path) -> Iterator[tuple[World, str, Upload]]:
    from oras.client import OrasClient

    with ExitStack() as stack:
        server = stack.enter_context(Registry(folder / "registry"))
        world = open_world(stack, folder, f"oci://{server.host}")
        world.credentials(f"oci://{server.host}", username=USER, password=PASSWORD)
        client = OrasClient(hostname=server.host, insecure=True, auth_backend="basic")
        client.auth.set_basic_auth(USER, PASSWORD)

        def push(file: Path) -> None:
            target = f"{server.host}/theirs/model:latest"
            client.push(target=target, files=[str(file)], disable_path_validation=True)

        yield world, f"oci://{server.host}/ours/model:{{pair}}", push


def open_world(stack: ExitStack, folder: Path, prefix: str, **settings: object) -> World:
    folder.mkdir(parents=True, exist_ok=True)
    world = World(folder, migrated_sqlite(folder / "nightpress.db"), destinations=[prefix], **settings)
    stack.callback(world.close)
    return world


# Ticks ---------------------------------------------------------------------------------------------------------------


def ticks(folder: Path, server: Postgres, rows: int) -> list[Figure]:
    """Milliseconds of a look for due deliveries while nothing is due, and of taking four that are due: with ten rows and with many.

    Both are measured in turn, each in a database of its own. The fastest tenth counts: other work on the machine only adds.
    """
    worlds = {}
    for name, count in (("few", 10), ("many", rows)):
        worlds[name] = World(folder / name, migrated_postgres(server), destinations=["hf://acme"])
        fill(worlds[name], worlds[name].accept(), count)
    figures = []
    for kind, seconds, take in (("nothing due", 3600.0, look), ("four taken", -1.0, take_four)):
        taken: dict[str, list[float]] = {name: [] for name in worlds}
        for world in worlds.values():
            set_due(world, seconds)
        for _ in range(100):
            for name, world in worlds.items():
                taken[name].append(take(world))
        few, many = (statistics.quantiles(taken[name], n=10)[0] for name in ("few", "many"))
        figures += [
            Figure(f"tick/{kind}/few", round(few, 2), "ms"),
            Figure(f"tick/{kind}/many", round(many, 2), "ms"),
            Figure(f"tick/{kind}/ratio", round(many / few, 2), bar="<= 1.2"),
        ]
    for world in worlds.values():
        world.close()
    return figures


def look(world: World) -> float:
    began = time.perf_counter()
    assert world.store.take_due(limit=4, ttl_s=60) == []
    return 1000 * (time.perf_counter() - began)


def take_four(world: World) -> float:
    began = time.perf_counter()
    taken = world.store.take_due(limit=4, ttl_s=60)
    took = 1000 * (time.perf_counter() - began)
    assert len(taken) == 4
    for due in taken:
        world.store.release(due.claim)
    return took


def fill(world: World, job_id: str, count: int) -> None:
    """Add deliveries: of ten, five are settled, one is due in an hour, and four are due."""
    known: dict[str, object] = {"tenant_id": TENANT, "job_id": job_id, "artifact": "onnx", "attempts": 0}
    known |= {"total_bytes": 0, "sent_bytes": 0, "resume": {}}
    with transaction(world.engine) as connection:
        for number in range(count):
            kind = number % 10
            row = {**known, "id": new_id("dlv"), "destination": f"hf://acme/{new_id('m')}"}
            settled = {"state": "failed", "next_at": None, "finished_at": db_now()}
            waiting = {"state": "pending", "next_at": db_now(3600.0 if kind == 5 else -1.0), "finished_at": None}
            connection.execute(
                insert(deliveries).values(**row, created_at=db_now(), **(settled if kind < 5 else waiting))
            )


def set_due(world: World, seconds: float) -> None:
    """Move all pending deliveries, and let the database clean up, as it does by itself after a while."""
    with transaction(world.engine) as connection:
        moved = deliveries.update().where(deliveries.c.state == "pending")
        connection.execute(moved.values(next_at=db_now(seconds)))
    with world.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE deliveries")


if __name__ == "__main__":
    sys.exit(main())
