"""Checks whether the broker answers, and translates its URL for redis-py. Rings are sent by core/service/jobs/ring.py."""

from urllib.parse import quote, urlsplit

_TIMEOUT_S = 1.0


def ping_broker(url: str) -> None:
    """Raise ConnectionError unless the Redis or Valkey server of a Celery URL answers."""
    from redis import Redis  # takes 0.1 s to import, and only a readiness probe needs it
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry

    client = Redis.from_url(
        client_url(url),
        socket_timeout=_TIMEOUT_S,
        socket_connect_timeout=_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),  # the client's own retries would take longer than the probe waits
    )
    try:
        client.ping()
    except RedisError as error:
        raise ConnectionError("the broker does not answer") from error
    finally:
        client.close()


def client_url(url: str) -> str:
    """A Celery URL in the form that redis-py reads: the two write the URL of a unix socket differently."""
    parts = urlsplit(url)
    if parts.scheme != "redis+socket":
        return url
    return f"unix://{f':{parts.password}@' if parts.password else ''}{quote(parts.path)}"
