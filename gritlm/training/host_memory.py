"""How much of the host's memory this process may still take."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = Path("/sys/fs/cgroup")
FILES = (  # of a Linux control group, version 2 and 1: its limit, what is taken, and what of that is only cached
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_host_memory() -> int:
    """Bytes: what is available, or less where a control group (a container, a batch job) or `ulimit -v` leaves less."""
    free = psutil.virtual_memory().available
    if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        free = min(free, most - psutil.Process().memory_info().vms)
    for group in _own_groups():
        for limit, taken, cached in FILES:
            try:
                stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
                most, now = (int((group / name).read_text(encoding="utf-8")) for name in (limit, taken))
                left = most - now + int(stat[cached])
            except (OSError, ValueError, KeyError):  # of the other version, or without a limit
                continue
            free = min(free, left)
    return max(free, 0)


def _own_groups() -> Iterator[Path]:
    """The folders of this process's groups and of those around them; in a container its own may be the topmost."""
    listing = Path("/proc/self/cgroup")
    for line in listing.read_text(encoding="utf-8").splitlines() if listing.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = GROUPS / controllers
            group = top / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))
