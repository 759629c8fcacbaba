"""Where a program runs, and how it holds memory there."""

import contextlib
import ctypes
import functools
import os
import resource
import shutil
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import kernels
from mostgan.config import UserError
from mostgan.program import cores


def pick_device():
    """The GPU if there is one, else the CPU, told to keep freed memory for the next step, with no
    more threads than `cores`. OMP_NUM_THREADS in the environment is obeyed as it is.

    glibc hands every large buffer back to the system and faults its pages in anew, step after step:
    on a virtual machine that costs up to half of a CPU step. So it does with the arenas that it
    gives to other threads. Values are mallopt's M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD and
    M_ARENA_MAX.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if usable_threads() < torch.get_num_threads():
        torch.set_num_threads(usable_threads())
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20), (-8, 1)):
            libc.mallopt(parameter, value)
    return torch.device("cpu")


def usable_threads():
    """PyTorch's threads, but no more than `cores`, unless OMP_NUM_THREADS says how many."""
    count = torch.get_num_threads()
    return count if "OMP_NUM_THREADS" in os.environ else min(count, cores())


@contextlib.contextmanager
def one_core_threads(most=None):
    """As many threads as PyTorch may use, or `most`, each with one OpenMP thread: nothing that they
    compute waits at a barrier. Beside other busy processes a barrier takes longer than the work
    before it.

    Gives a function: submit(function, *arguments) → its future. Functions run in inference mode and
    under the caller's autocast. At the end what has not begun is dropped, and no thread is left.
    """
    count, before = usable_threads(), torch.get_num_threads()
    dtype, enabled = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    def run(function, *arguments):
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype, enabled=enabled, cache_enabled=False),
        ):
            return function(*arguments)

    pool = ThreadPoolExecutor(min(count, most or count), initializer=_use_one_openmp_thread)
    try:
        yield functools.partial(pool.submit, run)
    finally:
        pool.shutdown(cancel_futures=True)
        # What threads start with is the whole process's, and until now it was theirs.
        torch.set_num_threads(before)


def _use_one_openmp_thread():
    # A thread's first question sets its number to the process's, and would undo ours later.
    torch.get_num_threads()
    torch.set_num_threads(1)


def in_order(submit, jobs, ahead):
    """Yields the results of jobs, tuples for `submit`, in their order; at most `ahead` + 1 of them
    are waiting, at work or done at once.
    """
    pending = deque()
    for job in jobs:
        pending.append(submit(*job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


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


def has_bf16(device):
    """Whether a device computes in bfloat16: a GPU (those before Ampere slowly), and a CPU whose
    system names such instructions (avx512_bf16, amx_bf16, or bf16 on ARM).
    """
    if device.type == "cuda":
        return True
    try:
        return any(word.endswith("bf16") for word in Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False


def peak_memory_mb(device):
    """Most memory held so far, in MB (10⁶ bytes): of the GPU's allocator, or resident on a CPU; of
    this process, not of those that take pieces of its batch (pieces.py).
    """
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
