"""The launch script with stand-ins for Python, srun and scontrol that say how they are called."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

from helpers import ROOT

PYTHON = """#!/bin/bash
[ "$*" != "-m gritlm devices" ] || { . "$(dirname "$0")/devices"; exit; }
case "$*" in *check_python.py) exit 0 ;; esac
echo "PYTHON $*"
echo "IN $PWD" """
TWO_GPUS = "printf '0\\tNVIDIA H100\\t80000\\t81559\\n1\\tNVIDIA H100\\t79000\\t81559\\n'"


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


class Launcher:
    """A copy of the scripts, and a folder of stand-ins before the rest of PATH."""

    def __init__(self, folder: Path, bash: str):
        self.folder, self.bash, self.tools = folder, bash, folder / "tools"
        shutil.copytree(ROOT / "scripts", folder / "repo" / "scripts")
        program(folder / "repo" / ".venv" / "bin" / "python", PYTHON)
        program(folder / "repo" / "scripts" / "setup.sh", "exit 0")
        for name in ("python3", "python"):  # active, and without dependencies
            program(self.tools / name, "#!/bin/sh\necho 'found no torch, wanted torch>=2.13' >&2; exit 1")
        self.devices("")
        (folder / "call").mkdir()
        (folder / "call" / "data.jsonl").touch()

    def devices(self, answer: str) -> None:
        """A shell command that answers `python -m gritlm devices`."""
        (self.folder / "repo" / ".venv" / "bin" / "devices").write_text(answer + "\n")

    def slurm(
        self, hostnames="echo n1", node="echo NodeName=n1 NodeAddr=10.0.0.1 X=1", requeue="exit 0", job="1"
    ) -> dict:
        lines = f"*hostnames*) {hostnames} ;; *'show node'*) {node} ;; *requeue*) {requeue} ;; *) exit 1 ;;"
        program(self.tools / "scontrol", f'#!/bin/bash\ncase "$*" in {lines} esac')
        program(self.tools / "srun", '#!/bin/bash\ncase "$*" in *hostname) echo head7;; *) echo "SRUN $*";; esac')
        place = {"SLURM_SUBMIT_DIR": self.folder / "call", "SLURM_JOB_NODELIST": "n[1-2]"}
        return place | {"SLURM_JOB_ID": job, "SLURM_NNODES": "2"}

    def __call__(self, *flags: str, **env) -> subprocess.CompletedProcess:
        given = {"MODEL_NAME_OR_PATH": "m", "TRAIN_DATA": "data.jsonl", "OUTPUT_DIR": "o"} | env
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "HIP", "SLURM", "PYTHON", "GPUS"))}
        kept |= {"PATH": f"{self.tools}:{os.environ['PATH']}"} | {k: str(v) for k, v in given.items()}
        script = self.folder / "repo" / "scripts" / "training" / "train_embonly.sh"
        return subprocess.run(
            [self.bash, script, *flags],
            cwd=self.folder / "call",
            env=kept,
            capture_output=True,
            text=True,
            timeout=60,
        )


def started(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "distributed.run" in line]
    assert len(lines) == 1, done.stdout
    return lines[0]


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train_embonly: error: ")
    assert "distributed.run" not in done.stdout
    return done.stderr
