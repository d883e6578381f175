"""What a container or a batch job may take, not what its host has."""

import os
import resource
from pathlib import Path

import psutil
import pytest
from helpers import run
from processes import Ranks

from gritlm.training import host_memory
from gritlm.training.host_memory import free_host_memory

GIB = 2**30
ASK = """
import os, sys
open(sys.argv[1], "w").write(str(os.getpid()))
from gritlm.training.host_memory import free_host_memory
print(free_host_memory())
"""


def test_without_a_limit_it_is_the_hosts():
    assert 0 < free_host_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("limit", "left"), [(str(GIB), GIB * 3 // 4), ("max", None), (str(GIB // 4), 0)])
def test_what_a_group_says(tmp_path, monkeypatch, limit, left):
    """Of version 2, whose topmost group is a container's own; half a GiB is taken, half of that only cached."""
    if not any(line.startswith("0::") for line in Path("/proc/self/cgroup").read_text().splitlines()):
        pytest.skip("no control groups of version 2")
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{GIB // 2}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB // 4}\n")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path)
    found = free_host_memory()
    assert found == left if left is not None else found > GIB


def test_a_real_group_with_a_limit():
    for top, file in (("", "memory.max"), ("memory", "memory.limit_in_bytes")):
        group = host_memory.GROUPS / top / f"gritlm-test-{os.getpid()}"
        try:
            group.mkdir()
            with open(group / file, "r+") as out:  # the kernel has made it, or this is no group
                out.write(str(2 * GIB))
        except OSError:
            if group.is_dir():
                group.rmdir()
            continue
        try:
            asked = run("-c", ASK, str(group / "cgroup.procs"))
            assert GIB < int(asked.stdout) <= 2 * GIB < free_host_memory(), asked.stderr
        finally:
            group.rmdir()
        return
    pytest.skip("no right to make a control group here")


def print_what_is_free(limit: int) -> None:
    before = free_host_memory()
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + limit,) * 2)
    print(free_host_memory() <= limit < before)


def test_a_limit_on_the_address_space():
    done = Ranks(print_what_is_free, GIB // 4).wait()
    assert done.stdout == "True\n", done.stderr
