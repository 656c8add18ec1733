"""Whether the broker answers: the one question the API asks it directly. Rings go through core/jobs/ring.py."""

from typing import Any
from urllib.parse import urlsplit

_TIMEOUT_S = 1.0


def ping_broker(url: str) -> None:
    """Raise ConnectionError unless the Redis or Valkey server of a Celery URL answers."""
    from redis import Redis  # 0.1 s of import that only a readiness probe needs
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry

    options: dict[str, Any] = {
        "socket_timeout": _TIMEOUT_S,
        "socket_connect_timeout": _TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),  # the client's own retries would take longer than the probe waits
    }
    parts = urlsplit(url)
    if parts.scheme == "redis+socket":  # Celery's way to write a unix socket
        client = Redis(unix_socket_path=parts.path, **options)
    else:
        client = Redis.from_url(url, **options)
    try:
        client.ping()
    except RedisError as error:
        raise ConnectionError("the broker does not answer") from error
    finally:
        client.close()
