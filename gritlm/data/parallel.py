"""Map a function over items in several processes: results in order, bounded memory."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_work: Callable


def in_order(work: Callable[..., Result], items: Iterable[tuple], processes: int) -> Iterator[Result]:
    """Yield `work(*item)` for each item, in order. Each process has at most two items in flight.

    `work` need not be picklable and may be large, because the processes are forked. One process: no fork.
    """
    if processes < 2:
        yield from (work(*item) for item in items)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _remember, (work,)) as pool:
        yield from submit_in_order(pool, _call, items, processes)


def submit_in_order(pool: Executor, call: Callable, items: Iterable[tuple], processes: int) -> Iterator[Any]:
    """Yield `call(*item)` of a pool for each item, in order. Each process has at most two items in flight."""
    running: deque = deque()
    try:
        for item in items:
            running.append(pool.submit(call, *item))
            if len(running) > 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _remember(work: Callable) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _call(*item: Any) -> Any:
    return _work(*item)
