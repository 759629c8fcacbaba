"""Where a program runs, and how it holds memory there."""

import ctypes
import os
import resource
import shutil
import sys

import torch

import kernels
from mostgan.config import UserError


def pick_device():
    """The GPU if there is one, else the CPU, told to keep freed memory for the next step.

    glibc hands every large buffer back to the system and faults its pages in anew, step after step:
    on a virtual machine that costs up to half of a CPU step. Values are mallopt's M_MMAP_MAX,
    M_TRIM_THRESHOLD and M_TOP_PAD.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):
            libc.mallopt(parameter, value)
    return torch.device("cpu")


def choose_kernels(choice, compiles, device):
    """kernels.use(choice), and is there what torch.compile needs? Raises UserError where something
    is not installed.

    The shapes of a run hardly change, so cuDNN may look for its fastest algorithm for each.
    """
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        kernels.use(choice)
    except ImportError:
        raise UserError(
            "--kernels triton: Triton is not installed: pip install triton, or leave it out"
        ) from None
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if compiles and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "--compile on a CPU needs a C++ compiler, and there is none: install g++, or say "
            "--no-compile"
        )


def make_deterministic():
    """Have PyTorch choose algorithms that give the same bits in every run, or fail where it knows
    of none.
    """
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def peak_memory_mb(device):
    """Most memory held so far, in MB (10⁶ bytes): of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def memory_bytes(device):
    """All memory that a device has, free or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def to_host(windows, device):
    """Yields windows of frames, as `render` makes them, in host memory.

    On a GPU two pinned buffers and a stream of copies: while the caller works on one window, the
    next is rendered and copied, and the device waits for neither.
    """
    if device.type != "cuda":
        yield from windows
        return
    copies, buffers, pending = torch.cuda.Stream(device), [None, None], None
    for number, window in enumerate(windows):
        host = buffers[number % 2]
        if host is None or host.shape != window.shape:
            host = buffers[number % 2] = torch.empty(
                window.shape, dtype=window.dtype, pin_memory=True
            )
        copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            host.copy_(window, non_blocking=True)
        copied = copies.record_event()
        if pending is not None:
            yield _copied(*pending)
        pending = (
            window,
            host,
            copied,
        )  # the window is kept, for its memory must not be used again before
    if pending is not None:
        yield _copied(*pending)


def _copied(window, host, copied):
    """A window in memory of its own: its buffer is used again."""
    copied.synchronize()
    return host.clone()
