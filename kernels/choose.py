"""Which implementation of an op runs: each is compared with the op's plain PyTorch twin, timed, and
remembered.

At the first call of an op with new shapes, its candidates are run on the call's own tensors. A
candidate that raises, runs out of memory, gives another shape, dtype or memory layout than the
twin, or differs from the twin by more than `TOLERANCE` is dropped and named in the log. The fastest
of the rest serves this call and all later ones. Where PyTorch is told to be deterministic, the
first correct candidate serves, so that no clock decides about bits.

The table of choices lies in the user's cache folder, in one file for each device and set of
versions. A candidate is noted there before its first launch, because one that reads outside its
memory takes the process down: the next start then drops it. Of several processes (torchrun's RANK)
only the first writes.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import torch

# ‖difference‖ / ‖twin's result‖
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
PLAIN = "plain PyTorch"  # the name of the twin among the candidates
log = logging.getLogger("kernels")

mode = "auto"  # what kernels.use was told: auto, triton or reference
devices = {"cuda"}  # where candidates run at all; on other devices the twin does. Tests add "cpu"


class Unsuitable(Exception):
    """A candidate is not made for this device or these shapes: dropped without a warning."""


class Op(NamedTuple):
    """An op: `twin` and every candidate take the same arguments and give the same results."""

    name: str
    twin: object
    candidates: dict  # name → function; names begin with their kind: Triton, cuDNN, matrix products

    def __call__(self, *args):
        """Runs the implementation that the mode, the device and the table of choices say."""
        return without_autocast(self._run, args)

    def _run(self, *args):
        if _device(args).type not in devices or mode == "reference":
            return self.twin(*args)
        if mode == "triton":
            return self._first_triton(args)
        return self.function(choices().of(self, args))(*args)

    def function(self, name):
        return self.twin if name == PLAIN else self.candidates[name]

    def _first_triton(self, args):
        """The first of the Triton candidates that is suitable; no error of a kernel is hidden."""
        for name, candidate in self.candidates.items():
            if name.startswith("Triton"):
                with contextlib.suppress(Unsuitable):
                    return candidate(*args)
        return self.twin(*args)


def registered(op, schema, keep=None, gradient=None):
    """The op as mostgan::<name> of PyTorch's: opaque to a compiler, which learns shapes from the
    twin. keep(inputs, output) → (tensors, other values): what gradient(ctx, *grads) finds in
    ctx.saved_tensors and ctx.settings; it returns the gradient of every input.
    """
    of_torch = torch.library.custom_op(f"mostgan::{op.name}", op, mutates_args=(), schema=schema)
    of_torch.register_fake(lambda *args: without_autocast(op.twin, args))

    def setup_context(ctx, inputs, output):
        tensors, ctx.settings = keep(inputs, output)
        ctx.save_for_backward(*tensors)

    if gradient is not None:
        of_torch.register_autograd(gradient, setup_context=setup_context)
    return of_torch


def without_autocast(function, args):
    """function(*args): the arguments of an op have the dtypes that it works in."""
    with torch.autocast(_device(args).type, enabled=False):
        return function(*args)


def _device(args):
    return next(a.device for a in args if torch.is_tensor(a))


def results(out):
    return [out] if torch.is_tensor(out) else list(out)


def describe(op, args):
    """What a choice depends on: the op, shapes, dtypes, memory order, and other arguments."""
    return " ".join([op.name, *(_describe(a) for a in args)])


def _describe(a):
    if not torch.is_tensor(a):
        return str(a).removeprefix("torch.")
    text = f"{'×'.join(map(str, a.shape)) or 'scalar'}:{str(a.dtype).removeprefix('torch.')}"
    channels_last = a.ndim > 3 and not a.is_contiguous() and a.movedim(-3, -1).is_contiguous()
    return text + ":channels-last" * channels_last


class Choices:
    """The table of choices: `rows` maps an op with its shapes to what was measured.

    A row is {"chosen": name, "ms": {name: …}, "error": {name: …}, "dropped": {name: why}}; while it
    is measured, {"trying": a name and the process that runs it} is there in place of "chosen".
    """

    def __init__(self, folder=None, key=None):
        self.key = device_key() if key is None else key
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (cache_folder() if folder is None else Path(folder)) / f"{digest}.json"
        self.rows, self.used, self.measured = {}, {}, set()
        self.writes = os.environ.get("RANK", "0") == "0"
        self._read()

    def of(self, op, args):
        """The implementation for these arguments, by name; measured if it is not known yet."""
        text = describe(op, args)
        if text not in self.used:
            row = self.rows.get(text, {})
            if "chosen" not in row and _capturing(args):
                return PLAIN  # nothing can be compared while a CUDA graph is recorded
            if row.get("chosen") not in (PLAIN, *op.candidates):
                row = self.race(op, args, row.get("dropped", {}))
                self.measured.add(text)
            self.used[text] = row["chosen"]
        return self.used[text]

    def race(self, op, args, dropped):
        """Compares and times all candidates but the dropped; the row, which is also saved."""
        text = describe(op, args)
        row = {"ms": {}, "error": {}, "dropped": dict(dropped)}
        try:
            wanted = results(op.twin(*args))
        except torch.OutOfMemoryError:
            log.warning(
                f"kernels: {text}: no memory to compare candidates: plain PyTorch this time"
            )
            release_memory()
            return row | {"chosen": PLAIN}  # not kept: there may be more memory another time
        self.rows[text] = row
        for name in (*op.candidates, PLAIN):
            if name not in row["dropped"]:
                self._try(op.function(name), name, args, wanted, text, row)
        del wanted
        release_memory()
        if not row["ms"]:
            row["ms"][PLAIN] = None
        deterministic = torch.are_deterministic_algorithms_enabled()
        row["chosen"] = (
            next(iter(row["ms"])) if deterministic else min(row["ms"], key=row["ms"].get)
        )
        row.pop("trying", None)
        self._write()
        return row

    def _try(self, function, name, args, wanted, text, row):
        """Runs a candidate; enters its time and error, or why it is dropped, into the row."""
        row["trying"] = {"name": name, "process": process()}
        self._write()
        try:
            out = results(function(*args))
            synchronize()
            error, problem = compare(out, wanted)
            del out
            if problem is None:
                row["error"][name] = error
                row["ms"][name] = milliseconds(functools.partial(function, *args), args)
        except Unsuitable as reason:
            row["dropped"][name] = f"not suitable: {reason}"
            return
        except torch.OutOfMemoryError:
            problem = "out of memory"
            release_memory()
        except Exception as reason:  # whatever a compiler or a driver may raise
            problem = f"{type(reason).__name__}: {(str(reason).splitlines() or [''])[0][:200]}"
            self._require_device(name, text)
        except BaseException:  # Ctrl-C says nothing about the candidate
            del row["trying"]
            self._write()
            raise
        if problem is not None:
            row["dropped"][name] = problem
            log.warning(f"kernels: {name} is not used for {text}: {problem}")

    def _require_device(self, name, text):
        """Ends a program whose device is broken; the table still says what was tried."""
        try:
            synchronize()
        except Exception as reason:
            again = "start the program again: it leaves this one out"
            raise RuntimeError(f"kernels: {name} broke the device at {text}; {again}") from reason

    def summary(self):
        """Such as '11 of 13 Triton, 2 cuDNN (measured now)': what this process has run, by kind."""
        if not self.used:
            return "plain PyTorch"
        kinds = [next(k for k in KINDS if name.startswith(k)) for name in self.used.values()]
        parts = [f"{kinds.count(k)} {k}" for k in KINDS if k in kinds]
        parts[0] = parts[0].replace(" ", f" of {len(kinds)} ", 1)
        new, all_of_them = len(self.measured), len(self.used)
        when = {0: "measured before", all_of_them: "measured now"}.get(new, f"{new} measured now")
        return f"{', '.join(parts)} ({when})"

    def _read(self):
        try:
            saved = json.loads(self.path.read_text())
            if saved["key"] != self.key:
                raise ValueError("it is of another device or version")
            rows = {text: _row_as_read(text, row) for text, row in saved["rows"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as reason:
            log.warning(
                f"kernels: the table {self.path} cannot be read ({reason}), so it is measured anew"
            )
            return
        self.rows = rows

    def _write(self):
        """Writes the table whole or not at all. A folder that cannot be written is named once."""
        if not self.writes:
            return
        temporary = self.path.with_name(f".{uuid.uuid4().hex}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w") as file:
                json.dump({"key": self.key, "rows": self.rows}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except OSError as reason:
            self.writes = False
            with contextlib.suppress(OSError):
                temporary.unlink()
            log.warning(
                f"kernels: {self.path} cannot be written ({reason}): it is measured anew each time"
            )


KINDS = ("Triton", "cuDNN", "matrix products", PLAIN)


@functools.cache
def choices():
    """The table of this process, read at the first call."""
    return Choices()


def _row_as_read(text, row):
    """A row as another process left it: what was being tried when that process ended is dropped."""
    trying = row.get("trying")
    row = {key: dict(row[key]) for key in ("ms", "error", "dropped")} | (
        {"chosen": row["chosen"]} if "chosen" in row else {}
    )
    if trying is not None and not _runs(trying["process"]):
        row["dropped"][trying["name"]] = "the process that tried it ended there"
        log.warning(f"kernels: {trying['name']} is not used for {text}: a process ended there")
    return row


def process():
    return f"{os.uname().nodename} {os.getpid()}"


def _runs(name):
    """Whether a process of this machine is still there, and is another one."""
    host, _, number = name.rpartition(" ")
    if host != os.uname().nodename or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except OSError as reason:
        return not isinstance(reason, ProcessLookupError)
    return True


def compare(out, wanted):
    """(largest relative error, None) of a candidate's results, or (None, what is wrong)."""
    worst = 0.0
    for i, (ours, twins) in enumerate(zip(out, wanted, strict=True)):
        mine, theirs = (
            {"shape": t.shape, "dtype": t.dtype, "strides": t.stride()} for t in (ours, twins)
        )
        for what in theirs:
            if mine[what] != theirs[what]:
                return None, f"result {i} has {what} {mine[what]}, not {theirs[what]}"
        if twins.numel() == 0:
            continue
        size = torch.linalg.vector_norm(twins, dtype=torch.float32)
        error = torch.linalg.vector_norm(ours - twins, dtype=torch.float32) / size.clamp_min(1e-30)
        error = float(error)
        if not error <= TOLERANCE[twins.dtype]:  # NaN is not less than anything
            return None, f"result {i} is wrong by {error:.1e}"
        worst = max(worst, error)
    return worst, None


def milliseconds(run, args):
    """Median time of a function that has run once before, in milliseconds."""
    if _device(args).type == "cuda":
        from triton.testing import do_bench

        first = _once(run)
        return first if first > 100 else do_bench(run, warmup=5, rep=20, return_mode="median")
    return statistics.median(_once(run) for _ in range(3))


def _once(run):
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - started)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release_memory():
    """Gives what a race allocated back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _capturing(args):
    return _device(args).type == "cuda" and torch.cuda.is_current_stream_capturing()


def device_key():
    """What a table is valid for."""
    cuda = torch.cuda.is_available()
    sources = sorted(Path(__file__).parent.glob("*.py"))
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sources))
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        "cudnn": torch.backends.cudnn.version(),
        "kernels": source.hexdigest()[:16],
    }


def cache_folder():
    """~/.cache/mostgan/kernels, or below $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mostgan" / "kernels"
