"""What the benchmarks share: the device's name, seconds of a call, and its ceilings measured in the same run."""

import statistics
import subprocess
import time
from datetime import date

import torch


def describe(device):
    """What figures depend on, for the JSON of a result."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
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


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device, dtype, repeats=5):
    """Arithmetic ceiling, flop/s: of a square matrix product (2048 wide on a CPU, 8192 on a GPU)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ b, device, repeats)


def copy_rate(device, repeats=5):
    """Memory ceiling, bytes/s read and written: of a copy too large for the caches."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, repeats)
