"""Idempotency keys on both kinds of database: which process may handle a request, and what follows if it dies meanwhile."""

import pytest
from sqlalchemy import Engine, update

from nightpress.core.database import db_now, transaction
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.service.access.idempotency import Answered, Begun, IdempotencyBook
from nightpress.core.service.tables.jobs import idempotency_keys

ANSWER = Answered(201, {"location": "/v1/models/mdl_1"}, b"{}" * 5000)


def code(book: IdempotencyBook, *given: str) -> ErrorCode:
    with pytest.raises(NightpressError) as refused:
        book.begin(*given)
    return refused.value.code


def test_a_request_is_begun_once_and_answered_for_a_day(engine: Engine):
    book = IdempotencyBook(engine)
    begun = book.begin("a", "k", "1")
    assert isinstance(begun, Begun)
    assert code(book, "a", "k", "1") is ErrorCode.CONFLICT
    assert code(book, "a", "k", "2") is ErrorCode.IDEMPOTENCY_MISMATCH
    assert isinstance(book.begin("b", "k", "2"), Begun), "another tenant's key is another key"
    book.answer(begun, ANSWER)
    assert book.begin("a", "k", "1") == ANSWER
    assert code(book, "a", "k", "2") is ErrorCode.IDEMPOTENCY_MISMATCH
    assert book.prune() == 0
    assert book.prune(0.0) == 2
    assert isinstance(book.begin("a", "k", "2"), Begun)


def test_what_was_refused_may_be_sent_again(engine: Engine):
    book = IdempotencyBook(engine)
    begun = book.begin("a", "k", "1")
    assert isinstance(begun, Begun)
    book.forget(begun)
    assert isinstance(book.begin("a", "k", "2"), Begun)


def test_who_came_too_late_writes_over_nobody(engine: Engine):
    book = IdempotencyBook(engine)
    dead = book.begin("a", "k", "1")
    with transaction(engine) as connection:
        connection.execute(update(idempotency_keys).values(locked_until=db_now(-1)))
    heir = book.begin("a", "k", "1")
    assert isinstance(dead, Begun)
    assert isinstance(heir, Begun)
    book.answer(dead, Answered(500, {}, b"no"))
    book.forget(dead)
    assert code(book, "a", "k", "1") is ErrorCode.CONFLICT
    book.answer(heir, ANSWER)
    assert book.begin("a", "k", "1") == ANSWER
