"""The people who have signed in, each with an id that stands where a key's id stands."""

import secrets
import string
import threading
import time
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from nightpress.core.database import clean_text, db_now, transaction
from nightpress.core.service.tables.access import people

_ALPHABET = string.ascii_lowercase + string.digits
_CACHE_S = 60.0
_CACHE_SIZE = 10_000
_SEEN_S = 60.0


class PeopleBook:
    """Safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert
        self._lock = threading.Lock()
        self._known: dict[tuple[str, ...], tuple[str, float]] = {}

    def know(self, claims: Mapping[str, Any]) -> tuple[str, str, str]:
        """Id, name and e-mail address of the person in these claims, who is written down at the first time.

        `claims`: of a token that was checked. Only `iss` and `sub` identify a person; name and address are for people to read.
        """
        name = _text(
            claims.get("name") or claims.get("preferred_username") or claims.get("email") or claims["sub"], 200
        )
        email = _text(claims.get("email") or "", 320)
        what = (claims["iss"], claims["sub"], name, email)
        known = self._known.get(what)
        if known is not None and time.monotonic() < known[1]:
            return known[0], name, email
        person_id = self._write(*what)
        with self._lock:
            if len(self._known) >= _CACHE_SIZE:
                self._known.clear()
            self._known[what] = (person_id, time.monotonic() + _CACHE_S)
        return person_id, name, email

    def _write(self, issuer: str, subject: str, name: str, email: str) -> str:
        columns = people.c
        this = (columns.issuer == issuer, columns.subject == subject)
        new = {
            "id": "U" + "".join(secrets.choice(_ALPHABET) for _ in range(7)),
            "issuer": issuer,
            "subject": subject,
            "name": name,
            "email": email,
        }
        fresh = self._insert(people).values(created_at=db_now(), seen_at=db_now(), **new)
        old = or_(columns.name != name, columns.email != email, columns.seen_at < db_now(-_SEEN_S))
        with transaction(self._engine) as connection:
            connection.execute(fresh.on_conflict_do_nothing(index_elements=["issuer", "subject"]))
            connection.execute(update(people).where(*this, old).values(name=name, email=email, seen_at=db_now()))
            return str(connection.execute(select(columns.id).where(*this)).scalar_one())


def _text(value: object, length: int) -> str:
    return clean_text("".join(letter for letter in str(value) if letter.isprintable()))[:length]
