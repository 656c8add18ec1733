"""A token bucket for each family of keys, stored in Redis so that all API processes count together.

While Redis does not answer, no rate is limited; the quotas in SQL still apply.
"""

import logging
import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from nightpress.api.broker import client_url
from nightpress.core.errors import ErrorCode, NightpressError

if TYPE_CHECKING:
    from redis.asyncio import Redis

#: Seconds to wait for Redis. Longer than the delays of a busy API process, so that these do not look like a Redis that does not answer.
_PATIENCE_S = 1.0
_CONNECTIONS = 8  #: most connections; they stay open, because opening one per request would delay a flood of requests
_REST_S = 5.0  #: seconds without requests to Redis after it did not answer
#: Takes a token from a bucket of ARGV[1] tokens that fills in a minute, by the server's clock. Returns 1 if it got a token, else 0, and
#: the number of tokens left.
_TAKE = """
local now = redis.call('TIME')
now = tonumber(now[1]) + tonumber(now[2]) / 1e6
local size = tonumber(ARGV[1])
local bucket = redis.call('HMGET', KEYS[1], 'left', 'at')
local left = math.min(size, tonumber(bucket[1] or size) + (now - tonumber(bucket[2] or now)) * size / 60)
local taken = 0
if left >= 1 then left = left - 1; taken = 1 end
redis.call('HSET', KEYS[1], 'left', tostring(left), 'at', tostring(now))
redis.call('EXPIRE', KEYS[1], 120)
return {taken, tostring(left)}
"""

log = logging.getLogger(__name__)


class Taken(NamedTuple):
    """Whether the bucket had a token for a request, and the response's RateLimit headers."""

    allowed: bool
    headers: list[tuple[bytes, bytes]]


class RateLimiter:
    """The rate limits of this process. Its connections belong to the event loop that first uses it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._redis: Redis | None = None
        self._script: Any = None
        self._rests_until = 0.0

    async def take(self, key_id: str, per_minute: int) -> Taken:
        """Take a token from the bucket of `key_id`. Never raises: while Redis does not answer, every request is allowed."""
        from redis.exceptions import RedisError

        if time.monotonic() < self._rests_until:
            return Taken(True, [])
        try:
            if self._script is None:
                self._connect()
            taken, raw = await self._script(keys=[f"nightpress:rate:{key_id}"], args=[per_minute])
        except (RedisError, OSError, TimeoutError) as error:
            log.warning("Requests are not counted: the broker does not answer (%s).", error)
            self._rests_until = time.monotonic() + _REST_S
            return Taken(True, [])
        left = float(raw)
        full_in = math.ceil((per_minute - left) * 60 / per_minute)
        headers = {
            b"ratelimit-limit": per_minute,
            b"ratelimit-remaining": int(left),
            b"ratelimit-reset": full_in,
        }
        return Taken(bool(taken), [(name, str(value).encode()) for name, value in headers.items()])

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()

    def _connect(self) -> None:
        from redis.asyncio import BlockingConnectionPool, Redis  # takes 0.1 s to import
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        pool = BlockingConnectionPool.from_url(
            client_url(self._url),
            max_connections=_CONNECTIONS,
            socket_timeout=_PATIENCE_S,
            socket_connect_timeout=_PATIENCE_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = Redis.from_pool(pool)
        self._script = self._redis.register_script(_TAKE)


def too_many(per_minute: int) -> NightpressError:
    """The error of a request that is over the rate limit of its key."""
    return NightpressError(
        ErrorCode.RATE_LIMITED,
        f"This key makes more than {per_minute} requests a minute.",
        hint="Wait for the seconds of Retry-After. Follow a job by its event stream instead of polling it.",
        retry_after_s=math.ceil(60 / per_minute),
    )
