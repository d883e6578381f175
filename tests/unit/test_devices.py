"""Which GPUs there are, and what is said of one that torch cannot use. There is none here: torch and the driver are
played.
"""

import ctypes
import stat

import pytest
import torch

from gritlm import devices
from gritlm.__main__ import main
from gritlm.cli import run_verb
from gritlm.errors import UserError

TORCH = torch.__version__.split("+")[0]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Sets what torch and the driver say. Without a call: no GPU, no driver, and torch for CUDA 13.0."""

    def play(gpus=0, cuda="13.0", hip=None, driver=("", (0, 0), ""), broken="") -> None:
        def ones(count, device):
            if broken:
                raise RuntimeError(broken)
            return original(count)

        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((70 + number) << 30, 80 << 30))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
        monkeypatch.setattr(torch, "ones", ones)
        monkeypatch.setattr(devices, "nvidia_driver", lambda: driver)

    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    original = torch.ones
    play()
    return play


def test_a_line_for_each_gpu(machine, monkeypatch, capsys):
    def lines() -> list[str]:
        assert run_verb(devices.main, []) == 0
        return capsys.readouterr().out.splitlines()

    assert lines() == [], "none"
    machine(gpus=2)
    assert lines() == ["0\tNVIDIA H100\t71680\t81920", "1\tNVIDIA H100\t72704\t81920"]
    for value, indices in {
        "4,5": ["4", "5"],
        "GPU-1f2e, GPU-77": ["GPU-1f2e", "GPU-77"],
        "1,0,-1,5": ["1", "0"],
        "": [],
        "-1": [],
        "NoDevFiles": [],
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert [line.split("\t")[0] for line in lines()] == indices, value
    machine(gpus=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7c1f")
    assert lines() == ["MIG-7c1f\tNVIDIA H100\t71680\t81920"]
    machine(gpus=1, hip="7.1", cuda=None)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "3")
    assert lines()[0].startswith("3\t"), "torch for ROCm prefers its own variable"


SEEN, OLD, AGED = (("2 NVIDIA GPU(s) are here", newest, "") for newest in ((13, 0), (12, 4), (11, 8)))
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"
UNUSABLE = {
    "an old driver": (
        {"driver": OLD, "gpus": 2, "broken": "The NVIDIA driver on your system is too old"},
        ("for CUDA 13.0", "runs CUDA 12.4 at most", f"torch=={TORCH}+cu126", "download.pytorch.org/whl/cu126"),
    ),
    "an old driver that torch does not list": ({"driver": OLD}, ("runs CUDA 12.4 at most",)),
    "a driver that is too old": (
        {"driver": AGED},
        ("no build of torch for CUDA 11 exists any more: update the driver",),
    ),
    "a torch for the CPU": (
        {"driver": SEEN, "cuda": None},
        ("2 NVIDIA GPU(s) are here", "is built without CUDA", f"torch=={TORCH}+cu130 --index-url https://download"),
    ),
    "a driver with an error": (
        {"driver": ("an NVIDIA driver is here", (13, 0), "cuInit: error 803")},
        ("an NVIDIA driver is here, and torch", "cuInit: error 803"),
    ),
    "a GPU that is too new": ({"driver": SEEN, "gpus": 2, "broken": NO_KERNEL}, ("GPU 0: ", "no kernel image")),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_gpu_that_torch_cannot_use(machine, capsys, name):
    played, wanted = UNUSABLE[name]
    machine(**played)
    assert run_verb(devices.main, []) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.count("\n") == 1
    assert all(part in found.err for part in wanted), found.err
    assert "GPUS=none" in found.err, "what to do"


def test_gpus_that_are_not_there(machine, monkeypatch):
    for value, gpus, found in (("0,9", 1, "1 of these 2 GPUs"), ("0", 0, "no GPU"), ("MIG-1,MIG-2", 1, "only one MIG")):
        machine(gpus=gpus)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES={value}: found .*{found}"):
            devices.list_devices()


def test_the_drivers_library(monkeypatch):
    """The calls of CUDA's driver, played; and where there is no library, nvidia-smi."""

    class Cuda:
        def __init__(self, code: int, count: int):
            self.cuInit = lambda flags: code
            self.cuDriverGetVersion = lambda out: setattr(out._obj, "value", 12040)
            self.cuDeviceGetCount = lambda out: setattr(out._obj, "value", count) or 0

    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/absent")
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: [])
    for (code, count), found in {
        (0, 3): ("3 NVIDIA GPU(s) are here", (12, 4), ""),
        (803, 0): ("an NVIDIA driver is here", (12, 4), "cuInit: error 803"),
        (100, 0): ("", (0, 0), ""),
    }.items():
        monkeypatch.setattr(ctypes, "CDLL", lambda name, code=code, count=count: Cuda(code, count))
        assert devices.nvidia_driver() == found


def test_nvidia_smi_in_place_of_the_library(monkeypatch, tmp_path):
    monkeypatch.undo()
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: X (UUID: GPU-1)" || echo "| CUDA Version: 12.4 |"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert devices.nvidia_driver() == ("1 NVIDIA GPU(s) are here", (12, 4), "")
    tool.write_text("#!/bin/sh\necho No devices found\n")
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: [])
    assert devices.nvidia_driver() == ("", (0, 0), "")
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: ["/dev/nvidia0"])
    assert devices.nvidia_driver() == ("/dev/nvidia0 is here", (0, 0), "found no libcuda.so.1")


def test_the_line_of_the_log(machine, monkeypatch):
    monkeypatch.setattr(devices.Path, "exists", lambda path: False)
    assert devices.device_name("cpu") == "CPU"
    assert devices.device_name("cuda:1") == "NVIDIA H100"
    assert devices.describe_devices(["NVIDIA H100"] * 8, False) == "8 x NVIDIA H100"
    assert devices.describe_devices(["A"] * 2 + ["B"], False) == "2 x A, 1 x B"
    assert devices.describe_devices(["CPU"], False) == "CPU, no GPU found"
    assert devices.describe_devices(["CPU"] * 2, True) == "CPU of 2 processes, no GPU found"
    machine(driver=SEEN, cuda=None)
    assert "CPU, by --use_cpu; 2 NVIDIA GPU(s) are here, and torch" in devices.describe_devices(["CPU"], True)
    with pytest.raises(UserError, match=r"built without CUDA.*--use_cpu True"):
        devices.describe_devices(["CPU"], False)
    machine(gpus=2)
    assert devices.describe_devices(["CPU"], True) == "CPU, by --use_cpu; 2 GPU(s) are not used"
    machine()
    monkeypatch.setattr(devices.Path, "exists", lambda path: str(path) == "/dev/kfd")
    assert devices.describe_devices(["CPU"], True) == "CPU, no GPU found (an AMD GPU needs torch built for ROCm)"
    machine(hip="7.1", cuda=None)
    with pytest.raises(UserError, match="torch finds no AMD GPU"):
        devices.describe_devices(["CPU"], False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.describe_devices(["CPU"], False) == "CPU, CUDA_VISIBLE_DEVICES= hides all GPUs"


def test_the_verb_is_there(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gritlm", "devices", "extra"])
    assert main() == 2
    assert "found 'extra' where no value is wanted" in capsys.readouterr().err
