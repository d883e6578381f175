"""What the launch script asks the machine and what it starts. Python, srun and scontrol are stand-ins that say how they
are called. Every test runs under this machine's bash, and under `bash3.2` and `bash4.2` where they are on PATH.
"""

import argparse
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from launcher import PYTHON, TWO_GPUS, Launcher, program, refused, started

BASHES = [path for path in map(shutil.which, ("bash", "bash3.2", "bash4.2")) if path]


@pytest.fixture(params=BASHES, ids=lambda path: Path(path).name)
def launcher(request, tmp_path) -> Launcher:
    return Launcher(tmp_path, request.param)


def test_the_devices_decide(launcher):
    assert "--nproc-per-node 1 -m gritlm train" in (cpu := started(launcher()))
    assert "--use_cpu True" in cpu
    assert "--bf16" not in cpu
    launcher.devices(TWO_GPUS)
    assert "--nproc-per-node 2 -m gritlm train" in (gpus := started(launcher()))
    assert "--bf16 True" in gpus
    assert "--use_cpu" not in gpus
    assert "--use_cpu True" in started(launcher(GPUS="none")), "not asked"
    assert "GPU 1 has 79000 of 81559 MiB free, wanted 97%" in refused(launcher(MIN_FREE_GPU_PERCENT=97))
    launcher.devices("echo '0, GH200, [N/A], [N/A]'; echo; echo '1, GH200, 90000, 91000'")
    assert "--nproc-per-node 2" in started(done := launcher())
    assert "GPU 0: its free memory is not known" in done.stdout
    launcher.devices('echo "0 GPU 80000 $CUDA_VISIBLE_DEVICES$HIP_VISIBLE_DEVICES"')
    assert "of 99 MiB" in refused(launcher(GPUS="9", HIP_VISIBLE_DEVICES="1", MIN_FREE_GPU_PERCENT=99999999))


def test_what_the_devices_are_not(launcher):
    assert "GPUS=0: found no GPU" in refused(launcher(GPUS="0"))
    launcher.devices("echo warning >&2; echo 'gritlm: error: torch is built for CUDA 13.0' >&2; exit 2")
    assert refused(launcher()) == "train_embonly: error: torch is built for CUDA 13.0\n"
    launcher.devices("echo Failed to initialize NVML: unknown error")
    assert "found 'Failed to initialize NVML: unknown error', wanted index, name" in refused(launcher())
    launcher.devices("")
    assert "SLURM granted GPUs (8)" in refused(launcher(SLURM_GPUS_ON_NODE=8))
    assert "SLURM granted GPUs (0)" in refused(launcher(SLURM_JOB_GPUS=0)), "number 0"
    assert "--use_cpu True" in started(launcher(SLURM_GPUS_ON_NODE=0))
    assert "--use_cpu True" in started(launcher(SLURM_GPUS_ON_NODE=8, GPUS="none"))


def test_paths_are_the_callers(launcher):
    done = launcher("--data_cache", "cache", TRAIN_DATA="data.jsonl", OUTPUT_DIR="")
    assert "--train_data data.jsonl --output_dir outputs/m-data.jsonl" in started(done)
    assert {line for line in done.stdout.splitlines() if line.startswith("IN ")} == {f"IN {launcher.folder / 'call'}"}
    assert "TRAIN_DATA=data2.jsonl: no such file" in refused(launcher(TRAIN_DATA="data2.jsonl"))


def test_the_task_of_the_default_is_built_once(launcher):
    def prepares() -> bool:
        done = launcher(MODEL_NAME_OR_PATH="", TRAIN_DATA="", OUTPUT_DIR="")
        assert "--train_data outputs/quickstart-task/train.jsonl" in started(done)
        return "-m gritlm quickstart prepare" in done.stdout

    qrels = launcher.folder / "call" / "outputs" / "quickstart-task" / "held_out" / "qrels" / "test.tsv"
    qrels.parent.mkdir(parents=True)
    assert prepares(), "unfinished"
    qrels.touch()
    assert not prepares()


def test_the_python_is_said(launcher):
    line = started(done := launcher())
    assert f"{launcher.folder}/repo/.venv/bin/python (of this checkout; not the active " in done.stdout
    assert "found no torch, wanted torch>=2.13)" in done.stdout
    assert line.startswith(f"PYTHON {launcher.folder}/repo/scripts/training/node.py -m torch.distributed.run")

    mine = launcher.folder / "mine" / "python3.13"
    program(mine, PYTHON.replace("PYTHON ", "MINE ").replace("exit 0 ;;", "echo found no torch >&2; exit 1 ;;"))
    (mine.parent / "devices").write_text("\n")
    assert started(done := launcher(PYTHON=mine)).startswith("MINE ")
    assert f"python {mine} (as PYTHON says, although it lacks something: found no torch)" in done.stdout
    assert "PYTHON=/absent/python: no such program" in refused(launcher(PYTHON="/absent/python"))

    program(launcher.tools / "python", PYTHON.replace("PYTHON ", "ACTIVE "))
    (launcher.tools / "devices").write_text("\n")
    assert started(done := launcher()).startswith("ACTIVE "), "the first that has all"
    assert f"python {launcher.tools}/python (the active one, which has all dependencies)" in done.stdout


def test_what_an_environment_lacks(tmp_path):
    """The real check under the real Python, on requirements of its own."""
    check = shutil.copytree(ROOT / "scripts", tmp_path / "scripts") / "training" / "check_python.py"
    for dependencies, said in {
        "['numpy>=1', 'psutil']": "",
        "['numpy>=1', 'no-such-package[extra]>=2']": "found no no-such-package, wanted no-such-package[extra]>=2\n",
        "['numpy>=999']": f"found numpy {__import__('numpy').__version__}, wanted numpy>=999\n",
    }.items():
        (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = {dependencies}\n")
        done = subprocess.run([sys.executable, check], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1 if said else 0, said)


def test_nodes_of_slurm(launcher):
    def endpoint(**env) -> str:
        line = started(launcher(**slurm, **env))
        assert line.startswith("SRUN --nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 ")
        return re.search(r"--nnodes 2 --rdzv-endpoint (\S+) --rdzv-id 1-0 ", line)[1]

    slurm = launcher.slurm()
    assert endpoint() == "10.0.0.1:10001"
    assert endpoint(MASTER_ADDR="h", MASTER_PORT=7) == "h:7"
    assert "MASTER_PORT=no: wanted a number" in refused(launcher(**slurm, MASTER_PORT="no"))
    slurm = launcher.slurm(node="exit 1")  # a compute node may not ask
    assert endpoint() == "n1:10001"
    slurm = launcher.slurm(hostnames="exit 1", node="exit 1")
    assert endpoint(SLURMD_NODENAME="n5") == "n5:10001"
    assert endpoint() == "head7:10001"
    (launcher.tools / "srun").unlink()
    if not shutil.which("srun"):
        assert "found no srun for a job of 2 nodes" in refused(launcher(**slurm))
        assert started(launcher(**slurm | {"SLURM_NNODES": "1"})).startswith("PYTHON ")


def test_jobs_beside_one_another(launcher):
    """Array tasks and jobs on one node: each has a port below the ephemeral range, and an array task a folder."""
    ports = set()
    for job in ("19999", "20000", "39998"):
        line = started(launcher(**launcher.slurm(job=job), OUTPUT_DIR="", SLURM_ARRAY_TASK_ID=job))
        assert f"--output_dir outputs/m-data.jsonl-{job} " in line
        ports.add(int(re.search(r"--rdzv-endpoint 10.0.0.1:(\d+) ", line)[1]))
    assert len(ports) == 3
    assert 1024 < min(ports) <= max(ports) < 32768


def test_a_copy_of_the_script_finds_its_checkout(launcher):
    """sbatch runs a copy. The checkout is the folder of the call, or where scontrol says that the script was."""
    slurm = launcher.slurm() | {"SLURM_NNODES": "1"}
    repo, copy = launcher.folder / "repo", launcher.folder / "spool" / "slurm_script"
    command = f'echo "   Command={repo}/scripts/training/train_embonly.sh --seed 1"'
    command = f"{command}; {command}"  # an array lists each task
    copy.parent.mkdir()
    shutil.copy(repo / "scripts/training/train_embonly.sh", copy)
    environment = {
        "PATH": f"{launcher.tools}:{os.environ['PATH']}",
        "MODEL_NAME_OR_PATH": "m",
        "TRAIN_DATA": "data.jsonl",
    }

    def submitted(folder: Path) -> subprocess.CompletedProcess:
        env = environment | {name: str(value) for name, value in slurm.items()} | {"SLURM_SUBMIT_DIR": str(folder)}
        return subprocess.run([launcher.bash, copy], cwd="/", env=env, capture_output=True, text=True, timeout=60)

    assert "run this file in its checkout, or submit from the repository's root" in refused(submitted(copy.parent))
    (repo / "data.jsonl").touch()
    assert f"{repo}/scripts/training/node.py" in started(submitted(repo))
    program(launcher.tools / "scontrol", f"#!/bin/bash\n{command}")
    done = submitted(launcher.folder / "call")
    assert f"{repo}/scripts/training/node.py" in started(done)


@pytest.mark.parametrize("code", [0, 75])
def test_a_stopped_job_is_requeued(launcher, code):
    """0 with an unfinished run: saved. 75: stopped before the ranks started."""
    slurm = launcher.slurm()
    out = launcher.folder / "call" / "o"
    out.mkdir()
    (out / "run.json").write_text('{"finished": false}' if code == 0 else "")
    program(launcher.tools / "srun", f"#!/bin/bash\nexit {code}")
    done = launcher(**slurm)
    assert done.returncode == 0
    assert "requeueing job 1" in done.stdout
    slurm = launcher.slurm(requeue="exit 1")
    program(launcher.tools / "srun", f"#!/bin/bash\nexit {code}")
    done = launcher(**slurm)
    assert done.returncode == 75
    assert "scontrol cannot requeue job 1; submit the same command again" in done.stderr


def test_without_the_tools_of_linux(launcher):
    """macOS has no setsid, no nproc and no /proc. `missing` names what a script would call."""
    tools = launcher.folder / "few"
    tools.mkdir()
    for name in ("bash", "basename", "cat", "dirname", "grep", "head", "sed", "tail"):
        (tools / name).symlink_to(shutil.which(name))
    done = launcher(PATH=str(tools))
    assert "--use_cpu True" in started(done)
    assert done.stderr == "", "command not found"


# What bash 3.2 lacks, or fails at under `set -u`. Each with a line that has it.
BEYOND_BASH_3 = {
    r"\$\{[\w@*#\[\]]+(,,?|\^\^?)": 'echo "${name,,}"',
    r"\bwait\s+(-\w*[npf])": "wait -n $child",
    r"\b(mapfile|readarray|coproc)\b": "mapfile -t lines < file",
    r"\b(declare|local|typeset)\s+-\w*[AgnlLuU]": "declare -A table",
    r"\|&|&>>": "make |& tee log",
    r"\$\{\w+@\w\}": "echo ${name@Q}",
    r"(?<!\[@\]\+)\"\$\{(launch|EXTRA_FLAGS)\[@\]\}\"": '"${launch[@]}" bash',
    r"\[\[? -v ": "[ -v name ]",
    r"\$\{[\w@]+: ?-\d+: ?-\d+\}|\[-\d+\]": "${words[-1]}",
    r"\bEPOCH(SECONDS|REALTIME)\b|\bBASHPID\b": "echo $EPOCHSECONDS",
    r"/proc/|\bsetsid\b|\bnproc\b(?!-)|\breadlink -f\b|\brealpath\b|\btimeout\b": "setsid python",
    r"\bsed -i\b|\bgrep -\w*P|\bdate -d\b|\bstat -c\b": "sed -i s/a/b/ file",
}


def beyond(text: str) -> list[str]:
    code = [re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines()]
    return [line for line in code if any(re.search(pattern, line) for pattern in BEYOND_BASH_3)]


@pytest.mark.parametrize("script", ["setup.sh", "training/train_embonly.sh", "training/machine.sh"])
def test_the_scripts_stay_within_bash_3(script):
    assert beyond((ROOT / "scripts" / script).read_text()) == []


@pytest.mark.parametrize(("pattern", "sample"), BEYOND_BASH_3.items())
def test_control_each_construct_is_noticed(pattern, sample):
    assert re.search(pattern, sample)
    assert beyond(f"true # {sample}\n  {sample}") == [f"  {sample}"]


def test_a_node_that_cannot_join(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("node", ROOT / "scripts" / "training" / "node.py")
    node = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(node)
    monkeypatch.setattr(node, "SECONDS", 1)

    def message(call) -> str:
        with pytest.raises(SystemExit) as exit_:
            call()
        assert exit_.value.code == 2
        return capsys.readouterr().err

    def meeting(endpoint: str) -> argparse.Namespace:
        return argparse.Namespace(rdzv_endpoint=endpoint)

    with socket.socket() as first:
        first.bind(("", 0))
        port = first.getsockname()[1]
        monkeypatch.setenv("SLURM_NODEID", "1")
        found = message(lambda: node.meet(meeting(f"127.0.0.1:{port}")))
        assert f"nothing answers at 127.0.0.1:{port} after 1 s" in found
        first.listen()
        node.meet(args := meeting(f"127.0.0.1:{port}"))
        assert args.rdzv_conf == "join_timeout=1,is_host=false"
        monkeypatch.setenv("SLURM_NODEID", "0")
        found = message(lambda: node.meet(meeting(f"n1:{port}")))
    assert f"port {port}, at which the nodes meet: Address already in use; choose another with MASTER_PORT=" in found
    node.meet(args := meeting(f"n1:{port}"))
    assert args.rdzv_conf == "join_timeout=1,is_host=true"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    node.check_gpus(4)
    assert "found 4 GPUs, wanted 8 as on the first node" in message(lambda: node.check_gpus(8))
