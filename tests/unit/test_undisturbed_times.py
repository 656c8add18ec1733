"""Groups of graphs that other work disturbed while they were timed are timed again."""

import pytest

from nightpress.core.compress.stages.stopwatch import undisturbed

QUIET = [[10.0, 4.0, 3.0], [10.5, 2.0]]
DISTURBED = [20.0, 1.5, 1.0]  # the graph that takes long was slowed down, the others were not


def again(*answers: list[float]):
    left, asked = list(answers), list[int]()

    def time_again(group: int) -> list[float]:
        asked.append(group)
        return left.pop(0)

    return time_again, asked


def test_groups_that_agree_are_timed_once():
    time_again, asked = again()
    assert undisturbed(QUIET, time_again) == QUIET
    assert asked == []


@pytest.mark.parametrize("place", range(3))
def test_a_disturbed_group_is_timed_again_until_it_agrees(place: int):
    quiet = [10.2, 1.6, 1.1]
    taken = [*QUIET[:place], DISTURBED, *QUIET[place:]]
    time_again, asked = again([17.0, 1.5, 1.0], quiet)
    assert undisturbed(taken, time_again) == [*QUIET[:place], quiet, *QUIET[place:]]
    assert asked == [place, place]


def test_the_least_disturbed_times_stay_on_a_machine_that_is_never_quiet():
    time_again, asked = again([18.0, 1.4, 1.0], [25.0, 1.3, 1.0], [19.0, 1.2, 1.0])
    assert undisturbed([QUIET[0], DISTURBED], time_again) == [QUIET[0], [18.0, 1.4, 1.0]]
    assert asked == [1, 1, 1]


def test_a_faster_time_makes_the_others_disturbed():
    time_again, asked = again([10.0, 2.0], [10.1, 3.0])
    assert undisturbed([[20.0, 1.0], [12.0, 1.5]], time_again) == [[10.0, 2.0], [10.1, 3.0]]
    assert asked == [0, 1]
