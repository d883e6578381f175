"""The GPUs of this machine, as torch sees them: `gritlm devices`, which the launch script asks, and a line of the log.

A GPU that is plainly there and that torch cannot use is an error. CUDA_VISIBLE_DEVICES decides which GPUs are meant.
"""

import ctypes
import glob
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from gritlm.cli import verb_parser
from gritlm.errors import UserError, first_line

EXAMPLES = """examples:
  gritlm devices
  CUDA_VISIBLE_DEVICES=2,3 gritlm devices

output: one line a GPU, separated by tabs: index, name, free MiB, total MiB
  2	NVIDIA H100 80GB HBM3	80490	81079

The index is the GPU's entry in CUDA_VISIBLE_DEVICES, if that is set. Without a GPU there is no line. The exit code is
2, with one line on stderr, for a GPU that torch cannot use."""

ON_THE_CPU = "to train on the CPU set GPUS=none (launch script) or --use_cpu True (gritlm train)"


def chosen_device(name: str | None) -> str:
    """The device that --device names; without it a GPU where there is one.

    Raises:
        UserError: torch cannot use it.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # no such device, no driver for it, or torch was built without it
        raise UserError(f"--device: found {name!r}, wanted cpu or cuda ({first_line(error)})") from error
    return name


@dataclass(frozen=True)
class Device:
    index: str  # the entry in CUDA_VISIBLE_DEVICES
    name: str
    free: int  # MiB
    total: int  # MiB


def main(argv: list[str]) -> int:
    verb_parser("devices", "List the GPUs that a run would use.", EXAMPLES).parse_args(argv)
    for device in list_devices():
        print(device.index, device.name, device.free, device.total, sep="\t")
    return 0


def list_devices() -> list[Device]:
    """The GPUs that this process may use.

    Raises:
        UserError: torch cannot use one, or CUDA_VISIBLE_DEVICES names one that is not there.
    """
    variable, named = visible_devices()
    if named == []:
        return []
    count = torch.cuda.device_count()
    if count == 0 and (reason := unusable_reason()):
        raise UserError(f"{reason}; {ON_THE_CPU}")
    if named is not None and count != len(named):
        found = f"{count} of these {len(named)} GPUs" if count else "no GPU"
        mig = " (a process can use only one MIG instance)" if "MIG-" in os.environ[variable] else ""
        raise UserError(f"{variable}={os.environ[variable]}: found {found}{mig}; name others; {ON_THE_CPU}")
    return [_device(number, named[number] if named else str(number)) for number in range(count)]


def visible_devices() -> tuple[str, list[str] | None]:
    """The variable that chooses the GPUs, and its entries: indices, UUIDs or MIG ids. None: all GPUs are meant."""
    hip = torch.version.hip and "HIP_VISIBLE_DEVICES" in os.environ  # torch then prefers it
    variable = "HIP_VISIBLE_DEVICES" if hip else "CUDA_VISIBLE_DEVICES"
    if variable not in os.environ:
        return variable, None
    entries = (entry.strip() for entry in os.environ[variable].split(","))
    # CUDA ends the list at an entry that names no GPU. SLURM writes NoDevFiles where a job has none.
    return variable, list(itertools.takewhile(lambda entry: entry not in ("", "-1", "NoDevFiles"), entries))


def _device(number: int, index: str) -> Device:
    try:
        torch.ones(1, device=f"cuda:{number}").add_(1).item()  # a build without this GPU's architecture fails only here
        free, total = torch.cuda.mem_get_info(number)
        return Device(index, torch.cuda.get_device_name(number), free >> 20, total >> 20)
    except RuntimeError as error:
        reason = unusable_reason() or f"torch {torch.__version__} cannot use it: {first_line(error)}"
        raise UserError(f"GPU {index}: {reason}; {ON_THE_CPU}") from error


def unusable_reason() -> str:
    """Why torch cannot use the GPU that is here. Empty if there is no GPU, or no known reason."""
    built = torch.version.cuda
    if torch.version.hip:
        if torch.cuda.device_count() == 0 and Path("/dev/kfd").exists():
            return "/dev/kfd is here and torch finds no AMD GPU; is this user in the groups `render` and `video`?"
        return ""
    gpus, newest, problem = nvidia_driver()
    if not gpus:
        return ""
    if not built:
        return f"{gpus}, and torch {torch.__version__} is built without CUDA; {_how_to_install(newest)}"
    if 0 < newest[0] < int(built.split(".")[0]):
        runs = ".".join(map(str, newest))
        return (
            f"torch {torch.__version__} is built for CUDA {built}, and NVIDIA's driver here runs CUDA {runs} at most; "
            f"{_how_to_install(newest)}, or update the driver"
        )
    if torch.cuda.device_count() == 0:
        return f"{gpus}, and torch {torch.__version__} finds none ({problem or 'see the output of nvidia-smi'})"
    return ""


def nvidia_driver() -> tuple[str, tuple[int, int], str]:
    """What shows that an NVIDIA GPU is here, the newest CUDA that its driver runs, and the driver's error.

    Each may be unknown: "" and (0, 0).
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version, count = ctypes.c_int(), ctypes.c_int()
        cuda.cuDriverGetVersion(ctypes.byref(version))
        code = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
        newest = (version.value // 1000, version.value % 1000 // 10)
        if code == 0 and count.value:
            return f"{count.value} NVIDIA GPU(s) are here", newest, ""
        if code not in (0, 100):  # 100: no GPU
            return "an NVIDIA driver is here", newest, f"cuInit: error {code}"
    except (OSError, AttributeError):
        pass
    try:  # a driver whose library is not on the loader's path
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
        if gpus := re.findall(r"^GPU ", listed, re.M):
            shown = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
            found = re.search(r"CUDA Version: *(\d+)\.(\d+)", shown)
            newest = (int(found[1]), int(found[2])) if found else (0, 0)
            return f"{len(gpus)} NVIDIA GPU(s) are here", newest, ""
    except (OSError, subprocess.TimeoutExpired):
        pass
    if files := glob.glob("/dev/nvidia[0-9]*"):
        return f"{files[0]} is here", (0, 0), "found no libcuda.so.1"
    return "", (0, 0), ""


def _how_to_install(newest: tuple[int, int]) -> str:
    """The command that installs a build of torch for a driver. A driver also runs every older CUDA version."""
    if 0 < newest[0] < 12:
        return f"no build of torch for CUDA {newest[0]} exists any more: update the driver"
    build = "cu126" if newest[0] == 12 else "cu130"
    version = torch.__version__.split("+")[0]
    source = f"--index-url https://download.pytorch.org/whl/{build}"
    return f"install another build: {sys.executable} -m pip install torch=={version}+{build} {source}"


def device_name(device: str) -> str:
    """`cuda:0` as the name of its GPU, another device by its type."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device.split(":")[0].upper()


def describe_devices(names: list[str], use_cpu: bool) -> str:
    """The devices of all ranks in a few words, such as "8 x NVIDIA H100 80GB HBM3" or "CPU, no GPU found".

    Raises:
        UserError: the ranks are on the CPU without `use_cpu`, beside a GPU that torch cannot use.
    """
    if "CPU" not in names:
        return ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    described = "CPU" if len(names) == 1 else f"CPU of {len(names)} processes"
    if count := torch.cuda.device_count():
        return f"{described}, by --use_cpu; {count} GPU(s) are not used"
    variable, named = visible_devices()
    if named == []:
        return f"{described}, {variable}={os.environ[variable]} hides all GPUs"
    if reason := unusable_reason():
        if use_cpu:
            return f"{described}, by --use_cpu; {reason}"
        raise UserError(f"{reason}; {ON_THE_CPU}")
    other = "" if torch.version.hip or not Path("/dev/kfd").exists() else " (an AMD GPU needs torch built for ROCm)"
    return f"{described}, no GPU found{other}"
