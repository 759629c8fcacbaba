"""What every program does around its work: errors are one line, whatever the terminal can print."""

import contextlib
import math
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from mostgan.config import UserError


def run_program(work, interrupted="interrupted"):
    """Runs work(), a program's own function; if it fails, ends the process with an exit status: 2
    after an error that the user can mend, 130 after Ctrl-C, of which `interrupted` is said.

    work: returns None, or an exit status. An error is one line on stderr. What the terminal's
    encoding cannot print, such as a file's name, is written with backslashes.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a program as Ctrl-C does
    try:
        status = work() or 0
        sys.stdout.flush()
    except UserError as error:
        status = _say(f"error: {error}", 2)
    except KeyboardInterrupt:
        status = _say(interrupted, 130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        told = error.strerror or str(error)
        told = f"{error.filename}: {told}" if error.filename else told
        status = _say(f"error: {told}", 2)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        status = _say("error: there is too little memory for this", 2)
    if status:
        sys.exit(status)


def _say(text, status):
    with contextlib.suppress(OSError):
        print(" ".join(text.split()), file=sys.stderr, flush=True)
    return status


def is_out_of_memory(error):
    """Whether it is one of the errors for that: Python's, or PyTorch's on a GPU or on a CPU. (A
    program without PyTorch does not import it here.)
    """
    torch = sys.modules.get("torch")
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return of_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def need(package, extra):
    """UserError where a package is not installed that comes with an extra of pyproject.toml."""
    if find_spec(package) is None:
        raise UserError(
            f"this needs {package}: pip install 'mostgan[{extra}]', in a checkout pip install -e "
            f"'.[{extra}]'"
        )


def cores():
    """How many processes or threads can work at once: as many as this process may use cores, by its
    affinity and by the processor time that its control groups grant, rounded up.
    """
    able = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(able, math.ceil(min(_quotas(), default=able))))


def _quotas(own=Path("/proc/self/cgroup"), root=Path("/sys/fs/cgroup")):
    """Yields the limits on processor time, in cores, of this process's control groups (Linux,
    version 1 or 2) and of those around them.
    """
    with contextlib.suppress(OSError, ValueError):  # on other systems, there are none
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            group = root / ("cpu" if controllers else "") / path.lstrip("/")
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
            # A container may see its own group at the root, whatever the path.
            for folder in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):
                    quota, period = " ".join((folder / n).read_text() for n in names).split()
                    if float(quota) > 0:  # "max" or -1: no limit
                        yield float(quota) / float(period)
