"""The client's flows, run step by step without a network, and both drivers that run them."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from nightpress.client import ApiError, UnreachableError, access, calls
from nightpress.client.drivers import Blocking, EventLoop
from nightpress.client.flows import Flow, Listing, Pause, Request, Return, Yield, advance, every_page, send
from nightpress.client.transport import Options

NOBODY = Options("http://127.0.0.1:1", "np_key", retries=2, backoff_s=0.01)
Run = Callable[[Flow[Any]], Any]


def response(status: int, body: object = None, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers=headers, request=httpx.Request("GET", NOBODY.api_url))


def test_a_busy_answer_is_waited_for_as_long_as_it_asks_and_sent_again():
    flow = send(calls.recipe_schema(), NOBODY)
    first = advance(flow)
    assert isinstance(first, Request)
    assert first.arguments["url"] == "/v1/recipes/schema"
    pause = advance(flow, response(503, **{"retry-after": "2"}))
    assert isinstance(pause, Pause)
    assert pause.seconds == 2.0
    assert advance(flow) == first
    assert advance(flow, response(200, {"type": "object"})) == Return({"type": "object"})


def test_a_broken_connection_is_an_error_when_the_tries_are_used_up():
    flow = send(calls.recipe_schema(), NOBODY)
    broken = httpx.ReadError("cut")
    advance(flow)
    for _ in range(NOBODY.retries):
        assert isinstance(advance(flow, broken), Pause)
        assert isinstance(advance(flow), Request)
    with pytest.raises(UnreachableError, match="broke off"):
        advance(flow, broken)


def test_a_list_asks_for_its_next_page_when_the_last_is_used_up():
    def key(number: int) -> dict[str, Any]:
        stamps = dict.fromkeys(("expires_at", "revoked_at", "last_used_at", "rotated_from", "made_by"))
        return {
            "id": f"key_{number}", "tenant_id": "t", "name": "n", "prefix": "np", "scopes": [],
            "created_at": "2026-11-01T00:00:00Z", **stamps,
        }  # fmt: skip

    listing = every_page(access.page_keys, NOBODY, tenant_id="t")
    first = advance(listing)
    assert isinstance(first, Request)
    assert dict(first.arguments["params"]) == {"tenant_id": "t", "limit": "200"}
    handed_out = [advance(listing, response(200, {"items": [key(1), key(2)], "next_cursor": "c"})), advance(listing)]
    assert [step.item.id for step in handed_out if isinstance(step, Yield)] == ["key_1", "key_2"]
    second = advance(listing)
    assert isinstance(second, Request)
    assert dict(second.arguments["params"]) == {"tenant_id": "t", "limit": "200", "cursor": "c"}
    assert advance(listing, response(200, {"items": [], "next_cursor": None})) == Return(None)


@pytest.fixture(params=["blocking", "event loop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a flow; the test is repeated for each driver."""

    async def awaited(flow: Flow[Any]) -> Any:
        driver = EventLoop(NOBODY)
        try:
            return await driver.run(flow)
        finally:
            await driver.aclose()

    def either(flow: Flow[Any]) -> Any:
        if request.param == "event loop":
            return asyncio.run(awaited(flow))
        driver = Blocking(NOBODY)
        try:
            return driver.run(flow)
        finally:
            driver.close()

    return either


def test_a_driver_sends_back_what_came_of_each_step_and_returns_the_answer(run: Run):
    def flow() -> Flow[list[object]]:
        paused = yield Pause(0.01)
        refused = yield Request({"method": "GET", "url": "/"})
        return [paused, type(refused)]

    assert run(flow()) == [None, httpx.ConnectError]


def test_a_driver_raises_what_the_flow_raises(run: Run):
    def flow() -> Flow[None]:
        yield Pause(0.0)
        raise ApiError.from_response(response(404))

    with pytest.raises(ApiError) as raised:
        run(flow())
    assert raised.value.status == 404


def test_drivers_hand_out_items_in_order():
    def numbers() -> Listing[int]:
        for number in range(3):
            yield Yield(number)
            yield Pause(0.0)

    async def awaited() -> list[int]:
        driver = EventLoop(NOBODY)
        try:
            return [number async for number in driver.iterate(numbers())]
        finally:
            await driver.aclose()

    driver = Blocking(NOBODY)
    assert list(driver.iterate(numbers())) == asyncio.run(awaited()) == [0, 1, 2]
    driver.close()


def test_a_cancelled_task_stops_its_transfer():
    begun, stopped = threading.Event(), threading.Event()

    def work(*, stop: threading.Event) -> None:
        begun.set()
        assert stop.wait(30)
        stopped.set()

    async def cancelled() -> None:
        driver = EventLoop(NOBODY)
        task = asyncio.create_task(driver.transfer(work))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await driver.aclose()

    asyncio.run(cancelled())
    assert stopped.wait(30)
