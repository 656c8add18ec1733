"""The set of error codes is closed: each has a title and a status, and can be written to a job's row and read back."""

import pytest

from nightpress.core.errors import ERROR_KINDS, ErrorCode, NightpressError
from nightpress.core.logs import redact


def test_every_code_has_a_kind() -> None:
    assert set(ERROR_KINDS) == set(ErrorCode)


def test_an_error_survives_its_row() -> None:
    error = NightpressError(ErrorCode.DISK_FULL, "No space.", hint="Free some.", needed=5)
    again = NightpressError.from_dict(error.as_dict())
    assert (again.code, again.message, again.hint, again.details) == (
        error.code,
        error.message,
        error.hint,
        error.details,
    )


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer np_abcd1234_hunter2hunter2", "hunter2"),
        ("GET /x?X-Amz-Signature=deadbeef&y=1", "deadbeef"),
        ("redis://:hunter2@valkey:6379/0", "hunter2"),
        ("postgresql://nightpress:hunter2@db/nightpress", "hunter2"),
    ],
)
def test_secrets_do_not_reach_the_log(text: str, secret: str) -> None:
    assert secret not in redact(text)


def test_an_address_is_no_secret() -> None:
    text = "Ready at http://127.0.0.1:8790/docs, mail me@example.org"
    assert redact(text) == text
