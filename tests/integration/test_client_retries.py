"""Answers that are lost on their way to a client: which requests it repeats, and that the server executes them once."""

import asyncio
import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nightpress import ApiError, AsyncClient, Client, UnreachableError, migrations
from nightpress.client import access, schedule_calls
from nightpress.client.calls import Call
from nightpress.core.settings import Settings
from tests.api import RunningApi, serve
from tests.patience import slowness
from tests.proxy import CuttingProxy

Send = Callable[[Call[Any]], Any]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApi]:
    inside = [ipaddress.IPv4Network("127.0.0.0/8")]
    folder = tmp_path_factory.mktemp("retries")
    settings = Settings(data_dir=folder, broker_url="redis://127.0.0.1:1/0", webhook_networks=inside)
    migrations.upgrade(settings.sql_url)
    with serve(settings) as running:
        yield running


@pytest.fixture
def proxy(api: RunningApi) -> Iterator[CuttingProxy]:
    with CuttingProxy(int(api.url.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture(params=["sync", "async"])
def sent(api: RunningApi, proxy: CuttingProxy, request: pytest.FixtureRequest) -> Send:
    """A function that sends a call through the proxy, with either client, for a tenant that only this test uses."""
    key = api.key(tenant_id=request.node.name.replace("[", "-").rstrip("]")[-60:])

    async def apart(call: Call[Any]) -> Any:
        async with AsyncClient(proxy.url, key) as client:
            return await client.send(call)

    def send(call: Call[Any]) -> Any:
        if request.param == "async":
            return asyncio.run(apart(call))
        with Client(proxy.url, key) as client:
            return client.send(call)

    return send


def nightly() -> Call[Any]:
    return schedule_calls.create_schedule("nightly", "0 2 * * *", "some-model", "int8-encoder")


@pytest.mark.slow
def test_a_post_whose_answer_is_lost_is_sent_again_and_done_once(proxy: CuttingProxy, sent: Send):
    proxy.cut_answers(0, 5)
    made = sent(nightly())
    assert [item.id for item in sent(schedule_calls.page_schedules()).items] == [made.id]
    proxy.cut_answers(0)
    run = sent(schedule_calls.trigger_schedule(made.id))
    assert [item.id for item in sent(schedule_calls.page_schedule_runs(made.id)).items] == [run.id]


@pytest.mark.slow
def test_a_secret_whose_answer_is_lost_is_not_shown_again_and_its_owner_told_what_to_do(
    proxy: CuttingProxy, sent: Send
):
    proxy.cut_answers(0)
    with pytest.raises(ApiError) as told:
        sent(access.create_webhook("http://127.0.0.1:9/", ["job.failed"]))
    assert told.value.code == "conflict"
    assert "rotate" in told.value.hint
    [hook] = sent(access.page_webhooks()).items
    assert sent(access.rotate_secret(hook.id)).secret.startswith("whsec_")


def test_an_edit_of_a_named_version_is_not_sent_again(proxy: CuttingProxy, sent: Send):
    made = sent(nightly())
    proxy.cut_answers(0)
    with pytest.raises(UnreachableError, match="broke off"):
        sent(schedule_calls.edit_schedule(made.id, version=made.version, overlap="queue"))
    assert sent(schedule_calls.get_schedule(made.id)).version == made.version + 1


@pytest.mark.slow
def test_a_deletion_whose_answer_is_lost_is_done_and_one_of_nothing_is_an_error(proxy: CuttingProxy, sent: Send):
    made = sent(nightly())
    proxy.cut_answers(0)
    assert sent(schedule_calls.delete_schedule(made.id, version=made.version)) is None
    assert sent(schedule_calls.page_schedules()).items == []
    with pytest.raises(ApiError) as missing:
        sent(schedule_calls.delete_schedule(made.id))
    assert missing.value.code == "not_found"


@pytest.mark.slow
def test_a_request_that_is_still_being_answered_is_waited_for(
    api: RunningApi, proxy: CuttingProxy, sent: Send, monkeypatch: pytest.MonkeyPatch
):
    create, begun = api.services.resources.schedules.create, threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        time.sleep(1.5)
        return create(*args, **kwargs)

    def cut() -> None:
        assert begun.wait(10 * slowness())
        proxy.drop_all()

    monkeypatch.setattr(api.services.resources.schedules, "create", slowly)
    cutting = threading.Thread(target=cut)
    cutting.start()
    made = sent(nightly())
    cutting.join()
    assert [item.id for item in sent(schedule_calls.page_schedules()).items] == [made.id]
