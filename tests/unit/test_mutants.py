"""The mutants of `make mutate` still fit the code, so that a run doesn't stop half way."""

import pytest

from tests.mutation import MUTANTS, ROOT, TESTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_a_mutant_changes_one_place_and_has_tests_that_could_notice(mutant: Mutant):
    assert (ROOT / mutant.path).read_text().count(mutant.old) == 1
    for test in mutant.tests or TESTS[mutant.path]:
        assert (ROOT / test.partition("::")[0]).is_file()
