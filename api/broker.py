"""Whether the broker answers: the one question the API asks it directly. Rings go through core/jobs/ring.py."""

from urllib.parse import urlsplit

from redis import Redis
from redis.exceptions import RedisError

_TIMEOUT_S = 1.0


def ping_broker(url: str) -> None:
    """Raise ConnectionError unless the Redis or Valkey server of a Celery URL answers."""
    parts = urlsplit(url)
    if parts.scheme == "redis+socket":  # Celery's way to write a unix socket
        client = Redis(unix_socket_path=parts.path, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    else:
        client = Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S)
    try:
        client.ping()
    except RedisError as error:
        raise ConnectionError("the broker does not answer") from error
    finally:
        client.close()
