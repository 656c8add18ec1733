"""What both clients do with models and data sets: send, fetch, register, and wait until they are there."""

import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from nightpress.client import access, calls, delivery_calls
from nightpress.client.calls import Call
from nightpress.client.drivers import Blocking
from nightpress.client.errors import ClientError
from nightpress.client.flows import Flow, Pause
from nightpress.client.folders import SentFolder, read_sent_folder
from nightpress.client.methods import Driver, Resource, ask, flow, pages, transfer
from nightpress.client.transfers import UNWATCHED, Meter, Transfers
from nightpress.client.uploads import finish_upload
from nightpress.core.recipes.models import plain_name
from nightpress.core.wire.models import DataSetCreate, DataSetView, ModelCreate, ModelView

Uploaded = TypeVar("Uploaded", ModelView, DataSetView)


class Models(Resource[Driver]):
    """Models: immutable folders with a digest. `model`: an id, or a name, which means the newest ready model of that name."""

    list = ask(calls.page_models)
    iterate = pages(calls.page_models)
    get = ask(calls.get_model)
    possible = ask(calls.possible_for_model)
    delete = ask(calls.delete_model)
    latest = ask(calls.latest_of)
    promote = ask(calls.promote)
    promotions = pages(calls.page_promotions)
    destinations = ask(delivery_calls.get_destinations)
    set_destinations = ask(delivery_calls.set_destinations)
    feed = ask(access.get_promotions_feed)

    @flow
    def fetch(self, source: str, name: str, *, base: str | None = None) -> Flow[ModelView]:
        """Have the server fetch a model from `s3://…` or `hf://…`. Returns at once; `wait` returns when it is there.

        base: of an adapter, as for `upload`. Raises ApiError where the operator of the server does not allow the source.
        """
        return (yield from self._ask(calls.create_model(ModelCreate(name=name, source=source, base=base))))

    @flow
    def wait(
        self, model: str, *, poll_s: float = 1.0, on_update: Callable[[ModelView], None] | None = None
    ) -> Flow[ModelView]:
        """Return the model once the server has fetched and verified it: it is then `ready` or `failed`.

        `on_update` is called with each answer, every `poll_s` seconds.
        """
        return (yield from _until_settled(self, lambda: calls.get_model(model), poll_s, on_update))

    @flow
    def register(self, path: str, name: str | None = None, *, base: str | None = None) -> Flow[ModelView]:
        """Use a folder on the server in place. base: of an adapter, as for `upload`.

        Raises ApiError(path_not_allowed) where its operator hasn't allowed it.
        """
        name = name or plain_name(Path(path).name)
        return (yield from self._ask(calls.create_model(ModelCreate(name=name, path=path, base=base))))

    @transfer
    def upload(
        self: "Models[Blocking]",
        folder: Path | SentFolder,
        name: str | None = None,
        *,
        base: str | None = None,
        meter: Meter = UNWATCHED,
        stop: threading.Event | None = None,
    ) -> ModelView:
        """Send a local folder. Afterwards its name means these bytes.

        base: of an adapter (LoRA), the model that it was trained for: an id, a name, or an address, which the server fetches if it doesn't
        have it. None: the one that its adapter_config.json names. Then `wait` returns when the base is there, and fits.
        Nothing is sent where the name means these bytes already. A broken upload is continued. Setting `stop` ends the transfer.
        Raises NightpressError for a folder that is neither a model nor an adapter, and ApiError, UnreachableError or TransferError.
        """
        chosen = folder if isinstance(folder, SentFolder) else read_sent_folder(folder, name)
        transfers = Transfers(self._driver.http, self._driver.options, meter, stop=stop or threading.Event())
        announced = transfers.hash_files(chosen.files)
        wanted = {(file.path, file.size, file.sha256) for file in announced}
        model = self._find(chosen.name, wanted, base)
        if model is None:
            model = self._driver.send(calls.create_model(ModelCreate(name=chosen.name, files=announced, base=base)))
        if model.state == "uploading":
            finish_upload(self._driver, transfers, "models", model, chosen.files)
            model = self.get(model.id)
        return model

    def _find(
        self: "Models[Blocking]", name: str, wanted: Collection[tuple[str, int, str]], base: str | None
    ) -> ModelView | None:
        """The model of this name with these files (path, size, SHA-256), unless the name means a newer model by now.

        None also for an adapter on an address: only the server knows which model that is.
        """
        if base is not None and "://" in base:
            return None
        base_id = None if base is None else self.get(base).id
        for model in self.iterate():
            if model.name == name and model.state != "failed":
                same = {(file.path, file.size, file.sha256) for file in model.files} == wanted
                if same and base_id in {None, model.base_id}:
                    return model
                if model.state == "ready":
                    return None
        return None


class DataSets(Resource[Driver]):
    """Data sets: one immutable file of prose or of labelled rows. `data_set`: an id or a name."""

    list = ask(calls.page_data_sets)
    iterate = pages(calls.page_data_sets)
    get = ask(calls.get_data_set)
    delete = ask(calls.delete_data_set)

    @flow
    def fetch(self, source: str, name: str) -> Flow[DataSetView]:
        """Have the server fetch a data set from `s3://…` or `hf://…`. Returns at once; `wait` returns when it is there.

        Raises ApiError where the operator of the server does not allow the source.
        """
        return (yield from self._ask(calls.create_data_set(DataSetCreate(name=name, source=source))))

    @flow
    def wait(
        self, data_set: str, *, poll_s: float = 1.0, on_update: Callable[[DataSetView], None] | None = None
    ) -> Flow[DataSetView]:
        """Return the data set once the server has fetched and verified it: it is then `ready` or `failed`.

        `on_update` is called with each answer, every `poll_s` seconds.
        """
        return (yield from _until_settled(self, lambda: calls.get_data_set(data_set), poll_s, on_update))

    @flow
    def register(self, path: str, name: str | None = None) -> Flow[DataSetView]:
        """Use a file on the server in place. Raises ApiError(path_not_allowed) where its operator hasn't allowed it."""
        name = name or plain_name(Path(path).name.split(".")[0])
        return (yield from self._ask(calls.create_data_set(DataSetCreate(name=name, path=path))))

    @transfer
    def upload(
        self: "DataSets[Blocking]",
        file: Path,
        name: str | None = None,
        *,
        meter: Meter = UNWATCHED,
        stop: threading.Event | None = None,
    ) -> DataSetView:
        """Send a local file: `.txt` or `.jsonl`, plain or `.gz`. Setting `stop` ends the transfer.

        Raises ClientError where it is not a file, and ApiError, UnreachableError or TransferError.
        """
        if not file.is_file():
            raise ClientError(f"{file} is not a file.", hint="A data set is one .txt or .jsonl file, plain or .gz.")
        transfers = Transfers(self._driver.http, self._driver.options, meter, stop=stop or threading.Event())
        [announced] = transfers.hash_files({file.name: file})
        request = DataSetCreate(name=name or plain_name(file.name.split(".")[0]), file=announced)
        data_set = self._driver.send(calls.create_data_set(request))
        if data_set.state == "uploading":
            finish_upload(self._driver, transfers, "datasets", data_set, {file.name: file})
            data_set = self.get(data_set.id)
        return data_set


def _until_settled(
    resource: Resource[Driver],
    get: Callable[[], Call[Uploaded]],
    poll_s: float,
    on_update: Callable[[Uploaded], None] | None,
) -> Flow[Uploaded]:
    """Ask until a model or data set is neither fetched nor verified any more."""
    while True:
        view = yield from resource._ask(get())
        if on_update:
            on_update(view)
        if view.state not in {"fetching", "verifying"}:
            return view
        yield Pause(poll_s)
