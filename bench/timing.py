"""What the benchmarks share: the device's name, seconds of a call, and its ceilings measured in the
same run.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import types
from datetime import date
from pathlib import Path
from unittest.mock import MagicMock

import torch

from mostgan.files import read_json, write_whole

ROOT = Path(__file__).resolve().parent.parent


def describe(device):
    """What figures depend on, for the JSON of a result."""
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return dict(device=name, torch=torch.__version__, date=str(date.today()), commit=commit)


def seconds(run, device, repeats, warmups=1):
    """Median seconds of run() over repeats, after warm-ups."""
    times = []
    for _ in range(warmups + repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warmups:])


def frames_trained(run):
    """The real frames that the newest checkpoint of a run was trained on; 0 without one."""
    saved = sorted(run.glob("checkpoint-*/training.json"))
    return read_json(saved[-1]).get("frames", 0) if saved else 0


def write(path, result):
    """Write a result to a JSON file, if a path was given; again after every row, so that a run cut
    off leaves some.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result, indent=1) + "\n")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device, dtype, repeats=5):
    """Arithmetic ceiling, flop/s: of a square matrix product (2048 wide on a CPU, 8192 on a
    GPU).
    """
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ b, device, repeats)


def copy_rate(device, repeats=5):
    """Memory ceiling, bytes/s read and written: of a copy too large for the caches."""
    source = torch.empty(
        2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, repeats)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module that is not installed, and finds anything in it."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda attribute: MagicMock()
        return module

    def exec_module(self, module):
        pass


def do_without(*names):
    """Let `import` succeed for packages that are not installed and that a benchmark imports but
    does not use: a machine lent for an hour may have PyTorch and little else.
    """
    bare = "MOSTGAN_BENCH_BARE" in os.environ  # to try how it is without them
    missing = [name for name in names if bare or importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, _Absent(missing))
