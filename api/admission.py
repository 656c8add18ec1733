"""Limits the number of uploads through the API at a time. A slow client's upload takes long, so each key and tenant has its own limit."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import Principal

UPLOADS = 64  #: uploads at a time in one process, each in its own thread
UPLOADS_A_TENANT = 16
UPLOADS_A_KEY = 8
_PATIENCE_S = 30.0


class Admission:
    """Admits uploads in the order of their arrival, within the limits of their key, their tenant and the process."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._all = asyncio.Semaphore(UPLOADS)
        self._shares: WeakValueDictionary[tuple[str, str], asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def of(self, caller: Principal) -> AsyncIterator[None]:
        """Wait for a place and hold it within the block. Raises NightpressError(rate_limited) if none is free after `patience_s`."""
        key = self._share("key", caller.family, UPLOADS_A_KEY)
        tenant = self._share("tenant", caller.tenant_id, UPLOADS_A_TENANT)
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(self._patience_s):
                    for places in (key, tenant, self._all):
                        await held.enter_async_context(places)
            except TimeoutError:
                raise NightpressError(
                    ErrorCode.RATE_LIMITED,
                    f"At most {UPLOADS_A_KEY} uploads per key and {UPLOADS_A_TENANT} per tenant run at a time, and none ended in {self._patience_s:g} s.",
                    hint="Send fewer parts at a time.",
                    retry_after_s=5,
                ) from None
            yield

    def _share(self, kind: str, name: str, places: int) -> asyncio.Semaphore:
        """The places of a key or a tenant. The entry exists while an upload holds a place or waits for one."""
        share = self._shares.get((kind, name))
        if share is None:
            share = self._shares[kind, name] = asyncio.Semaphore(places)
        return share
