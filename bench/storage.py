"""Upload and download of one large file: our S3 store beside boto3's own transfer manager with tuned settings, on the same server.

    python -m bench.storage [--size-mb 1024] [--pairs 5]

Each pair uploads and downloads the same bytes as new objects, in alternating order. Our store verifies the SHA-256 of the whole file
during the transfer, and that of each part at the server; boto3 verifies its CRC32. The reference is the fastest of several of boto3's
settings. The bar: at least 0.8 of its speed.
"""

import hashlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from pydantic import SecretStr

from bench.record import Figure, finish, make_parser
from nightpress.core.artifacts.open import open_store
from nightpress.core.settings import Settings
from tests.servers import S3

MIB = 1024**2


def make_file(path: Path, size: int) -> str:
    """Write random bytes, which can't be compressed. Returns their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as target:
        for _ in range(size // MIB):
            piece = os.urandom(MIB)
            digest.update(piece)
            target.write(piece)
    return digest.hexdigest()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tuned(client: Any, bucket: str, source: Path, target: Path) -> TransferConfig:
    """The fastest of several common settings for large files."""
    choices = [(8, 10), (16, 4), (16, 8), (32, 4), (64, 4)]
    best = (float("inf"), TransferConfig())
    for part, threads in choices:
        config = TransferConfig(
            multipart_threshold=part * MIB, multipart_chunksize=part * MIB, max_concurrency=threads, io_chunksize=MIB
        )
        key = f"tune/{part}-{threads}"
        took = seconds(lambda key=key, config=config: client.upload_file(str(source), bucket, key, Config=config))
        took += seconds(lambda key=key, config=config: client.download_file(bucket, key, str(target), Config=config))
        client.delete_object(Bucket=bucket, Key=key)
        best = min(best, (took, config), key=lambda choice: choice[0])
    return best[1]


def measure(size_mb: int, pairs: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder, S3(Path(folder) / "server") as server:
        bucket = server.create_bucket()
        store = open_store(
            Settings(
                _env_file=None,
                storage_url=f"s3://{bucket}/ours",
                s3_endpoint_url=server.endpoint,
                s3_access_key_id=SecretStr(server.access_key),
                s3_secret_access_key=SecretStr(server.secret_key),
            )
        )
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
            config=Config(max_pool_connections=32),
        )
        source, small, target = Path(folder) / "source", Path(folder) / "small", Path(folder) / "target"
        digest = make_file(source, size_mb * MIB)
        make_file(small, min(size_mb, 256) * MIB)
        config = tuned(client, bucket, small, target)
        took: dict[str, list[float]] = {"ours up": [], "boto3 up": [], "ours down": [], "boto3 down": []}
        for pair in range(pairs):
            roads: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
                "ours": (
                    lambda pair=pair: store.put_file(f"f{pair}", source, sha256=digest),
                    lambda pair=pair: store.get_file(f"f{pair}", target, sha256=digest),
                ),
                "boto3": (
                    lambda pair=pair: client.upload_file(str(source), bucket, f"f{pair}", Config=config),
                    lambda pair=pair: client.download_file(bucket, f"f{pair}", str(target), Config=config),
                ),
            }
            order = sorted(roads, reverse=bool(pair % 2))
            for step, name in ((0, "up"), (1, "down")):
                for road in order:
                    took[f"{road} {name}"].append(seconds(roads[road][step]))
                    if step:
                        target.unlink()
            store.delete_prefix(f"f{pair}")
            client.delete_object(Bucket=bucket, Key=f"f{pair}")
    figures = [
        Figure("boto3/part", config.multipart_chunksize // MIB, "MiB"),
        Figure("boto3/threads", config.max_request_concurrency, "threads"),
    ]
    for way, name in (("up", "upload"), ("down", "download")):
        ours, theirs = took[f"ours {way}"], took[f"boto3 {way}"]
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        spread = round(min(ratios), 2), round(max(ratios), 2)
        figures += [
            Figure(f"{name}/ours", round(size_mb / statistics.median(ours)), "MB/s"),
            Figure(f"{name}/boto3", round(size_mb / statistics.median(theirs)), "MB/s"),
            Figure(f"{name}/ratio", round(statistics.median(ratios), 3), "×", spread, ">= 0.8"),
        ]
    return figures


def main() -> int:
    parser = make_parser("storage", __doc__)
    parser.add_argument("--size-mb", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    return finish("storage", measure(options.size_mb, options.pairs), parser, options)


if __name__ == "__main__":
    sys.exit(main())
