"""Several processes give the results in order, and the first error."""

import os
import time

import pytest

from gritlm.data.parallel import in_order


def work(number: int) -> tuple[int, int]:
    if number == 7:
        raise ValueError("seven")
    time.sleep(0.02 * (number % 3))  # later items finish earlier
    return number, os.getpid()


def test_results_come_in_the_order_of_the_items():
    items = [(number,) for number in range(7)]
    one, two = list(in_order(work, items, 1)), list(in_order(work, items, 2))
    assert [number for number, _ in one] == [number for number, _ in two] == list(range(7))
    assert {process for _, process in one} == {os.getpid()}
    assert os.getpid() not in {process for _, process in two}


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_comes_after_the_results_before_it(processes):
    results = in_order(work, ((number,) for number in range(20)), processes)
    assert [next(results)[0] for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="seven"):
        next(results)


@pytest.mark.parametrize(("processes", "most"), [(1, 1), (2, 5)])
def test_items_are_read_only_when_a_process_is_free(processes, most):
    read: list[int] = []

    def items():
        for number in range(8, 100):
            read.append(number)
            yield (number,)

    next(in_order(work, items(), processes))
    assert len(read) == most
