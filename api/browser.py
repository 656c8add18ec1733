"""The cookies of the page: of a sign-in that has begun, of the session, and against requests that other sites forge.

| cookie | who reads it | sent |
|---|---|---|
| `nightpress_sign_in` | the API; encrypted | when the provider leads the browser back (SameSite=Lax) |
| `nightpress_session` | the API (HttpOnly) | by the page's own requests alone (SameSite=Strict) |
| `nightpress_csrf` | the page, which repeats it in the header X-CSRF-Token of every request that changes something | the same |

Where PUBLIC_URL is https, all are Secure and have the prefix `__Host-`, so that no other host of the domain can set them.
"""

import hashlib
import hmac
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.keys import Principal
from nightpress.core.service.access.oidc.sessions import SessionBook, digest_of
from nightpress.core.service.compose import Resources
from nightpress.core.settings import Settings

SIGN_IN, SESSION, CSRF = "nightpress_sign_in", "nightpress_session", "nightpress_csrf"
CSRF_HEADER = "x-csrf-token"
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def session_of(request: Request, resources: Resources) -> str | None:
    """The session's cookie of a request. None without one, and where people can't sign in."""
    if not resources.settings.oidc_issuer:
        return None
    return read(request, resources.settings, SESSION)


async def signed_in(
    sessions: SessionBook,
    in_a_thread: Callable[[Callable[[str], Principal], str], Awaitable[Principal]],
    request: Request,
    cookie: str,
) -> Principal:
    """The caller of a session. Raises NightpressError: unauthenticated, and forbidden for a forged request."""
    caller = sessions.cached(cookie)
    if caller is None:
        caller = await in_a_thread(sessions.authenticate, cookie)
    if request.method not in _READING:
        check_own_page(request, cookie)
    return caller


def check_own_page(request: Request, cookie: str) -> None:
    """Raise NightpressError(forbidden) for a request that our page has not made: it lacks what only our page can read."""
    given = request.headers.get(CSRF_HEADER, "")
    if not hmac.compare_digest(given.encode(), _csrf_token(cookie).encode()):
        raise NightpressError(
            ErrorCode.FORBIDDEN,
            "The request doesn't come from Nightpress' own page.",
            hint="Reload the page. A program needs a key: send `Authorization: Bearer np_…`.",
        )


def read(request: Request, settings: Settings, name: str) -> str | None:
    return request.cookies.get(_full_name(settings, name))


def keep(response: Response, settings: Settings, cookie: str) -> None:
    """Set the cookies of a session. They last as long as the browser runs, and the session at most as long as the settings say."""
    _set(response, settings, SESSION, cookie, readable=False, same_site="strict")
    _set(response, settings, CSRF, _csrf_token(cookie), readable=True, same_site="strict")
    clear(response, settings, SIGN_IN)


def keep_sign_in(response: Response, settings: Settings, cookie: str, seconds: float) -> None:
    _set(response, settings, SIGN_IN, cookie, readable=False, same_site="lax", seconds=seconds)


def clear(response: Response, settings: Settings, *names: str) -> None:
    for name in names:
        _set(response, settings, name, "", readable=False, same_site="strict", seconds=0)


def _set(
    response: Response,
    settings: Settings,
    name: str,
    value: str,
    *,
    readable: bool,
    same_site: str,
    seconds: float | None = None,
) -> None:
    parts = [f"{_full_name(settings, name)}={value}", "Path=/", f"SameSite={same_site.capitalize()}"]
    parts += [] if readable else ["HttpOnly"]
    parts += ["Secure"] if _is_encrypted(settings) else []
    parts += [] if seconds is None else [f"Max-Age={int(seconds)}"]
    response.headers.append("Set-Cookie", "; ".join(parts))


def _csrf_token(cookie: str) -> str:
    """Belongs to one session: a cookie that another host of the domain has planted doesn't fit."""
    return digest_of(f"csrf {hashlib.sha256(cookie.encode()).hexdigest()}")


def _full_name(settings: Settings, name: str) -> str:
    return f"__Host-{name}" if _is_encrypted(settings) else name


def _is_encrypted(settings: Settings) -> bool:
    return settings.public_url.startswith("https:")
