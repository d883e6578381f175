"""Real processes for tests, forked from a server that has imported the project: a rank starts in a tenth of a second.

What a user's command adds to this, a fresh interpreter and torchrun, is tested where it matters (`fresh=True`).
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gritlm.cli import exit_rank
from gritlm.distributed import destroy_process_group

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["gritlm.training.train", "gritlm.training.verify_gradients", "gritlm.gritlm", "sentence_transformers"]
)
GRACE = 3  # seconds that the other ranks have to end when one has failed


def _child(target: Callable, args: tuple, environment: dict[str, str], cwd: str, folder: str, name: str) -> None:
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that nobody has forked
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    target(*args)


class Ranks:
    """`target(*args)` in one process, or in ranks as torchrun starts them. When one fails, the others are ended."""

    def __init__(self, target: Callable, *args: Any, ranks: int = 1, cwd: Path = ROOT, **env: str):
        self.args, self.folder = args, tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
            torchrun = place | own | {"TORCHELASTIC_RUN_ID": "test"} if ranks > 1 else {}
            parts = (target, args, ENVIRONMENT | torchrun | env, str(cwd), self.folder.name, str(rank))
            self.processes.append(SERVER.Process(target=_child, args=parts))
            self.processes[-1].start()

    @property
    def running(self) -> list:
        return [process for process in self.processes if process.is_alive()]

    def wait(self) -> subprocess.CompletedProcess:
        end = time.monotonic() + 300
        while running := self.running:
            wait([process.sentinel for process in running], timeout=1)
            if any(process.exitcode for process in self.processes):
                end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                for process in running:
                    process.kill()
                    process.join()
        out, err = (
            "".join(path.read_text(errors="replace") for path in sorted(Path(self.folder.name).glob(f"*.{stream}")))
            for stream in ("out", "err")
        )
        self.folder.cleanup()
        code = next((process.exitcode for process in self.processes if process.exitcode), 0)
        return subprocess.CompletedProcess(self.args, code, out, err)


def as_main(command: list[str]) -> None:
    if command[0] == "-m":
        sys.argv = command[1:]
        from gritlm.__main__ import main

        exit_rank(main())
    sys.argv = command
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")


def run(*command: Any, ranks: int = 1, cwd: Path = ROOT, fresh: bool = False, **env: str):
    """`python -m gritlm ...`, or a script, as `ranks` processes. `fresh` starts Python anew, under torchrun for ranks.

    Any other Python command line is always started anew.
    """
    words = [str(word) for word in command]
    if not fresh and (words[:2] == ["-m", "gritlm"] or words[0].endswith(".py")):
        return Ranks(as_main, words, ranks=ranks, cwd=cwd, **env).wait()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | ENVIRONMENT | env
    return subprocess.run([*launcher, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def _in_group(function: Callable, args: tuple, folder: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    finally:
        destroy_process_group()


def run_ranks(function: Callable, *args: Any, ranks: int = 2) -> list:
    """`function(*args)` on real gloo ranks; what each returned, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        done = Ranks(_in_group, function, args, folder, ranks=ranks).wait()
        assert done.returncode == 0, done.stderr[-5000:]
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(ranks)]
