"""From an announced upload to a finished one: send the parts that the server lacks, close the upload, await its verification."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nightpress.client import calls
from nightpress.client.drivers import Blocking
from nightpress.client.errors import UnreachableError
from nightpress.client.transfers import Transfers
from nightpress.core.wire.models import DataSetView, ModelView, UploadFile

_POLL_S = 1.0  #: how often the state of an upload is asked while the server verifies it


def finish_upload(
    driver: Blocking, transfers: Transfers, kind: str, begun: ModelView | DataSetView, sources: Mapping[str, Path]
) -> None:
    """Send what is missing of an upload and wait until it is verified. `kind`: "models" or "datasets".

    Raises ClientError, of any kind, for what the transfers or the server can't do.
    """

    def missing() -> Sequence[UploadFile]:
        return driver.send(calls.uploads(kind, begun.id))

    transfers.upload(begun.uploads or missing(), sources, missing)
    try:
        driver.send(calls.complete(kind, begun.id))
    except UnreachableError:
        # The answer was lost, and perhaps the request was not. Reading the state is safe, completing twice is not.
        if driver.send(calls.upload_state(kind, begun.id)) not in {"ready", "verifying"}:
            raise
    while driver.send(calls.upload_state(kind, begun.id)) == "verifying":
        time.sleep(_POLL_S)
