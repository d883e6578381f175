"""A real SLURM of two nodes on this machine, from Debian's slurm-wlm and munge, in a folder of its own."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=2 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be started here; empty where one can."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if absent:
        return f"no {', '.join(absent)} here (Debian's slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "slurmd has to be started as root"


class Cluster:
    """Started on entry, ended on exit."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        ports = [_free_port() for _ in range(3)]
        names = {"host": socket.gethostname(), "folder": self.folder}
        names |= dict(zip(("port", "port1", "port2"), ports, strict=True))
        (self.folder / "slurm.conf").write_text(CONFIG.format(**names))
        munge = [
            f"--{name}-file={self.folder}/munge.{end}"
            for name, end in (("key", "key"), ("pid", "pid"), ("log", "log"), ("seed", "seed"))
        ]
        self("munged", "--force", f"--socket={self.folder}/munge.sock", *munge)
        self("slurmctld", "-i")
        for node in ("n1", "n2"):
            self("slurmd", "-N", node)
        self.wait(lambda: self("sinfo", "-h", "-o", "%T", "-t", "idle").strip(), 60, "idle nodes")
        return self

    def __exit__(self, *error) -> None:
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munge"):
            pid = self.folder / f"{name}.pid"
            if pid.exists():
                subprocess.run(["kill", pid.read_text().strip()], check=False)

    def __call__(self, *command, **env) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env | {name: str(value) for name, value in env.items()},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        return self("scontrol", "show", "job", job).split("JobState=")[1].split()[0]

    @staticmethod
    def wait(condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}: not within {seconds} s"
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
