"""A repository in the disk layout of the Hugging Face Hub's client: files in `blobs`, and a snapshot of links to them."""

import hashlib
import shutil
from pathlib import Path


def hub_snapshot(folder: Path, cache: Path) -> Path:
    """Copy a folder into `cache` in the layout of a download. Returns the snapshot's folder."""
    repository = cache / "models--acme--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1)) / "blobs" / blob.name)
    return snapshot
