"""Work on many things in several processes, in order, with bounded memory."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_work: Callable | None = None


def in_order(work: Callable[..., Result], items: Iterable[tuple], processes: int) -> Iterator[Result]:
    """`work(*item)` of each item, in their order; at most two items a process are on their way at a time.

    `work` may be anything, and large: processes are forked, so it is never copied. One process: this one.
    """
    if processes < 2:
        yield from (work(*item) for item in items)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _remember, (work,)) as pool:
        running: deque = deque()
        try:
            for item in items:
                running.append(pool.submit(_call, *item))
                if len(running) > 2 * processes:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for waiting in running:
                waiting.cancel()


def _remember(work: Callable) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _call(*item: Any) -> Any:
    return _work(*item)
