"""torchrun on one node, as train_embonly.sh starts it: node.py -m torch.distributed.run [its flags] -m gritlm train ...

It adds to torchrun:
- SIGUSR1, SIGTERM and SIGHUP: the ranks save and end with code 0, and run.json says "finished": false.
- SIGINT and SIGUSR2: the ranks end at once. So they do when the process that started this one is gone (kill -9).
- Several nodes wait for the first one, and say where they waited in vain.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

STOPPED = 75  # asked to stop before the ranks were started
SECONDS = int(os.environ.get("RENDEZVOUS_SECONDS", "300"))
asked = False  # to save and to end


def main(argv: list[str]) -> int:
    catch_signals()
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()
    # The ranks inherit this mask, so a signal waits for a rank that cannot save yet. The thread above takes it here.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    set_defaults()
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = torchrun.parse_args(argv[2:])
    args.signals_to_handle = "SIGQUIT"  # the others are ours
    count, nodes = int(args.nproc_per_node), torchrun.parse_min_max_nnodes(args.nnodes)[1]
    check_cores(count)
    if "--use_cpu" not in argv:
        check_gpus(count)
    if nodes > 1:
        meet(args)
    if asked:
        return STOPPED
    if count > 1:  # torchrun would set 1, and print five lines about it
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            say(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name} (SIGKILL: often the host's memory)")
            return 128 - failure.exitcode
        return failure.exitcode  # the rank itself has said why
    return 0


def catch_signals() -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, save)
    # A shell starts its background jobs with SIGINT ignored, so this does not depend on what was inherited.
    for number in (signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, end)


def save(number: int, frame: FrameType | None) -> None:
    global asked
    asked = True


def end(number: int, frame: FrameType | None) -> None:
    for again in (signal.SIGINT, signal.SIGUSR2):  # a terminal sends one, the launch script the other
        signal.signal(again, signal.SIG_IGN)
    raise KeyboardInterrupt  # torchrun ends the ranks


def watch(parent: int) -> None:
    """Pass the wish to save on to the ranks, those yet to come as well. End when the parent is gone."""
    import psutil

    this = psutil.Process()
    while os.getppid() == parent:
        time.sleep(0.5)
        if asked:
            for rank in this.children():
                with suppress(psutil.Error):
                    rank.send_signal(signal.SIGUSR1)
    os.kill(this.pid, signal.SIGINT)
    with suppress(OSError):
        say("the process that started this one was killed; the ranks end")
    time.sleep(60)
    os._exit(1)  # its ranks watch this process


def set_defaults() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large memory pages in torch: about 8% faster on a CPU
    # Chunks have many shapes. Expandable segments keep them from fragmenting the GPU memory.
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", allocator)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds between lines of a progress bar in a log


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_cores(count: int) -> None:
    if cores() < count:
        print(
            f"node: {socket.gethostname()}: found {cores()} CPU cores for {count} processes, which also tokenise:",
            "slow. Under SLURM ask for more, with --exclusive or --cpus-per-gpu 8",
            file=sys.stderr,
        )


def check_gpus(count: int) -> None:
    """The launch script counted the first node's GPUs. Every node starts that many ranks."""
    import torch

    if (found := torch.cuda.device_count()) != count:
        say(f"found {found} GPUs, wanted {count} as on the first node; ask for equal nodes, or set GPUS")
        sys.exit(2)


def meet(args: argparse.Namespace) -> None:
    """Find the first node's rendezvous, before torchrun waits for it without a word."""
    first = os.environ.get("SLURM_NODEID", "0") == "0"
    args.rdzv_backend, args.rdzv_conf = "c10d", f"join_timeout={SECONDS},is_host={str(first).lower()}"
    host, port = args.rdzv_endpoint.rsplit(":", 1)
    if first:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            say(f"port {port}, at which the nodes meet: {reason}; choose another with MASTER_PORT=...")
            sys.exit(2)
        return
    waited_until = time.monotonic() + SECONDS
    while not asked:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > waited_until:
                say(
                    f"nothing answers at {host}:{port} after {SECONDS} s (the first node's rendezvous: {error}); open "
                    "that port between the nodes, or choose another with MASTER_PORT=..."
                )
                sys.exit(2)
        time.sleep(1)


def say(message: str) -> None:
    print(f"node: error: {socket.gethostname()}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
