"""Opens the object store that the settings name."""

from pathlib import Path

from nightpress.core.artifacts.storage import ObjectStore
from nightpress.core.settings import Settings


def open_store(settings: Settings) -> ObjectStore:
    """The store that the settings name: `s3://bucket/prefix` or a folder."""
    if settings.objects_url.startswith("s3://"):
        # boto3 takes 0.2 s to import: import it only for S3
        from nightpress.core.artifacts.s3 import S3Store

        return S3Store.from_settings(settings)
    from nightpress.core.artifacts.local import LocalStore

    return LocalStore(Path(settings.objects_url.removeprefix("file://")))
