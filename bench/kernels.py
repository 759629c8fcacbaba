"""Each kernel at the paper's 256² shapes: Triton, compiled and eager reference, and how far from
the device's limits.

    python bench/kernels.py [--frames 1 16 64 192] [--dtype bfloat16] [--compile-at 64]
                            [--only mostatt] [--out FILE]
    python bench/kernels.py --aot [--quick] [--out FILE] [--readme kernels/README.md]

A row is an op of one layer on the frames of one clip. Floor: the larger of its bytes (each tensor
once) at the rate of a large copy and its arithmetic (twice the multiply-adds) at that of a large
matrix product, both measured in the same run. "conv" is the convolution with one kernel per frame;
eagerly that is one grouped cuDNN convolution, and "unfolded" is the same by batched matrix
products. Times are medians with the second-level cache emptied. Compiling takes seconds a shape, so
the compiled one is timed at --compile-at frames only.

On a CPU there is no Triton: the reference alone runs, at two small shapes. --aot needs no GPU: it
compiles what every launcher launches for A100, H100 and B200 (sm_80, sm_90, sm_100) and prints
registers, shared memory and spills.
"""

import argparse
import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else `kernels` is this file
import kernels
from bench.timing import write
from kernels import modconv, reference

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
AOT_LAYERS = [
    (torch.bfloat16, 16, 1, 8),
    (torch.bfloat16, 128, 1, 8),
    (torch.bfloat16, 16, 10, 10),
    (torch.float32, 16, 1, 8),
]


def channels(resolution):
    """Features at a resolution of the 256² model (spec §6)."""
    return min(16384 // resolution, 512)


BACKWARD_BYTES = {"mostatt": 1, "conv": 2, "epilogue": 1.5}  # of the forward's; the linear ops': 1


# -------------------------------------------------------------------------------------------- cases


def cases(frames, resolutions, dtype, device):
    """(op, shape, inputs, triton and reference as functions of them, bytes, flop) of every op,
    layer by layer.
    """

    def t(*shape, dtype=dtype, last=True):
        x = torch.randn(shape, device=device, dtype=dtype)
        return x.movedim(-3, -1).contiguous().movedim(-1, -3) if last and len(shape) > 3 else x

    N = frames
    for r in resolutions:
        for up in (2, 1):
            I, O, low = channels(r // up), channels(r), r // up
            high = 2 * low + 1 if up == 2 else r
            shape = f"{r}² {I}→{O}" + (" up" if up == 2 else "")
            x, weight, conv = t(N, I, low, low), t(N, O, I, 3, 3), t(N, O, high, high)
            demod, bias = t(N, O, dtype=torch.float32).abs() + 0.5, t(O, dtype=torch.float32)
            flop = 2 * N * O * I * 9 * low * low
            if 16 <= r <= 128:
                # As sampling has them: the content in float32, styles and W' in dtype.
                content = t(1, O, I, 3, 3, dtype=torch.float32)
                style = t(N, 8, 1, I + 6, last=False)
                run, plain = (mostatt_in(dtype, of) for of in (kernels, reference))
                tensors = [content, style, weight]
                of_scores_and_p = 32 * weight.numel()  # 2 · 8 each
                yield "mostatt", shape, (content, style), run, plain, tensors, of_scores_and_p
                inputs, tensors = (x, weight, up), [x, weight, conv]
                yield (
                    "conv",
                    shape,
                    inputs,
                    kernels.conv2d_per_frame,
                    reference.conv2d_per_frame,
                    tensors,
                    flop,
                )
                for name, run in modconv.PLAIN_CONVOLUTIONS.items():
                    yield f"conv {name}", shape, inputs, None, run, tensors, flop
                if up == 1:
                    fused = (x, weight, demod, bias)
                    run, plain = kernels.conv2d_epilogue, reference.conv2d_epilogue
                    yield "conv + epilogue", shape, fused, run, plain, tensors, flop
            y = t(N, O, r, r)
            yield (
                "epilogue",
                shape,
                (conv, demod, bias, up),
                kernels.epilogue,
                reference.epilogue,
                [conv, y],
                0,
            )
            if up == 1:
                half = t(N, O, r // 2, r // 2)
                yield (
                    "downsample2d",
                    shape,
                    (y,),
                    kernels.downsample2d,
                    reference.downsample2d,
                    [y, half],
                    0,
                )
                yield (
                    "upsample2d",
                    shape,
                    (half,),
                    kernels.upsample2d,
                    reference.upsample2d,
                    [y, half],
                    0,
                )
                yield "fir pad 2", shape, (y, 2), kernels.fir, reference.fir, [y, y], 0


def mostatt_in(dtype, module):
    """mostatt_demod of a module of ops with W' in dtype, as autocast would have it."""

    def run(content, style):
        if module is reference:  # plain PyTorch wants one dtype
            content = content.to(style.dtype)
        return module.mostatt_demod(content, style, None, dtype)

    return run


def backward(op):
    """op → its gradient alone: the graph is made at the first call of the result and kept."""
    kept = []

    def of(*args):
        if not kept:
            args = [a.detach().requires_grad_() if torch.is_tensor(a) else a for a in args]
            out = op(*args)
            out = [out] if torch.is_tensor(out) else list(out)
            kept.append(
                (out, [a for a in args if torch.is_tensor(a)], [torch.randn_like(o) for o in out])
            )
        out, inputs, cotangents = kept[0]
        return torch.autograd.grad(out, inputs, cotangents, retain_graph=True)

    return of


# ------------------------------------------------------------------------------------------- timing


def milliseconds(run, device):
    """Median milliseconds of run(); None if it does not fit in memory."""
    try:
        if device == "cuda":
            from triton.testing import do_bench

            return do_bench(run, warmup=10, rep=50, return_mode="median")
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times[1:])
    except torch.OutOfMemoryError:
        return None


def ceilings(dtype, device):
    """Bytes/s of a large copy (read and written) and flop/s of a large matrix product."""
    size, edge = (2**30, 8192) if device == "cuda" else (2**27, 2048)
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target, a = torch.empty_like(source), torch.randn(edge, edge, device=device, dtype=dtype)
    copy = milliseconds(lambda: target.copy_(source), device)
    return 2 * size / copy * 1e3, 2 * edge**3 / milliseconds(lambda: a @ a, device) * 1e3


def choose_mode(device):
    """The Triton kernels on a GPU, whatever else would be faster: they are what the table is
    about.
    """
    kernels.use("triton" if device == "cuda" else "reference")


def measure(args, dtype, device, result):
    """Rows of the table, printed and written as they come."""
    choose_mode(device)
    copy, matmul = ceilings(dtype, device)
    result["ceilings"] = dict(copy_bytes_per_s=copy, matmul_flop_per_s=matmul)
    print(
        f"copy {copy / 1e9:.0f} GB/s, matrix product {matmul / 1e12:.2f} TFLOP/s in {args.dtype}\n"
    )
    print(
        f"{'op':22}{'layer':>20}{'frames':>7}{'Triton':>10}{'compiled':>10}{'eager':>10}"
        f"{'GB/s':>8}{'TFLOP/s':>9}{'floor':>7}   times in ms"
    )
    rows = []
    resolutions = (16, 32, 64, 128, 256) if device == "cuda" else (16, 32)
    resolutions = (16,) if args.dry_run else resolutions
    for frames in args.frames:
        for name, shape, inputs, fast, plain, tensors, flop in cases(
            frames, resolutions, dtype, device
        ):
            for direction, wrap, share, traffic in (
                ("", lambda op: op, 1, 1),
                (" backward", backward, 2, BACKWARD_BYTES.get(name, 1)),
            ):
                op = name + direction
                if args.only and args.only not in op:
                    continue
                nbytes = traffic * sum(x.nbytes for x in tensors)
                floor = 1e3 * max(nbytes / copy, share * flop / matmul)
                row = dict(
                    op=op,
                    layer=shape,
                    frames=frames,
                    bytes=nbytes,
                    flop=share * flop,
                    floor_ms=floor,
                )
                runs = {
                    "triton_ms": fast if device == "cuda" else None,
                    "compiled_ms": None,
                    "eager_ms": plain,
                }
                if (
                    device == "cuda"
                    and frames == args.compile_at
                    and not direction
                    and fast is not None
                ):
                    torch.compiler.reset()  # or the ninth shape of a function would run eagerly
                    runs["compiled_ms"] = torch.compile(plain, dynamic=False, fullgraph=True)
                for key, run in runs.items():
                    run = run and wrap(run)
                    row[key] = (
                        None
                        if run is None
                        else milliseconds(functools.partial(run, *inputs), device)
                    )
                rows.append(row)
                show(row)
                # Row by row: a run that is cut off has its figures.
                write(args.out, result | dict(rows=rows))


def show(row):
    """One line of the table: rates and the fraction of the floor are of Triton's time, or else of
    the eager one.
    """
    times = (row["triton_ms"], row["compiled_ms"], row["eager_ms"])
    cells = "".join(f"{'–':>10}" if ms is None else f"{ms:10.4f}" for ms in times)
    ms = row["triton_ms"] or row["eager_ms"]
    rates = (
        f"{row['bytes'] / ms / 1e6:8.0f}{row['flop'] / ms / 1e9:9.2f}{row['floor_ms'] / ms:7.0%}"
        if ms
        else ""
    )
    print(f"{row['op']:22}{row['layer']:>20}{row['frames']:>7}{cells}{rates}", flush=True)


# ------------------------------------------------------------------------ ahead-of-time compilation


class CompileOnly:
    """Stands in for Triton's driver: launches compile for another architecture, and nothing runs.

    Inside `with CompileOnly(90) as rows`, launchers are given tensors on `meta`; rows has a line
    per program.
    """

    def __init__(self, arch):
        from triton.backends.compiler import GPUTarget

        self.arch, self.target, self.rows, self.seen = arch, GPUTarget("cuda", arch, 32), [], set()

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.arch  # Triton keeps what it has compiled by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def __enter__(self):
        import triton
        from triton.runtime.jit import JITFunction

        triton.runtime.driver.set_active(self)
        self.patched, self.run, recorder = JITFunction, JITFunction.run, self

        def compile_only(kernel, *args, grid, warmup, **kwargs):
            compiled = recorder.run(kernel, *args, grid=grid, warmup=True, **kwargs)
            recorder.record(kernel, compiled, args, kwargs)

        JITFunction.run = compile_only
        return self.rows

    def __exit__(self, *_):
        self.patched.run = self.run

    def record(self, kernel, compiled, args, kwargs):
        if compiled.hash in self.seen:
            return
        self.seen.add(compiled.hash)
        name, text = kernel.__name__.strip("_"), compiled.asm["ttir"]
        row = {"kernel": name, "arch": self.arch, "dtype": "bf16" if "bf16" in text else "fp32"}
        row["backward"] = "grad_" in name or "backward" in name or "find" in name
        row["tensor_cores"] = "tt.dot" in text
        settings = kwargs | (args[-1]._asdict() if hasattr(args[-1], "_asdict") else {})
        row["tile"] = {
            name: getattr(value, "value", value)
            for name, value in settings.items()
            if name.startswith("BLOCK") or name in ("MODE", "COLUMNS")
        }
        row |= {key: kwargs[key] for key in ("num_warps", "num_stages") if key in kwargs}
        self.rows.append(row | resources(compiled))
        show_resources(self.rows[-1])


def resources(compiled):
    """Shared memory of a program in bytes; registers, and bytes of stack (what it spills), of a
    thread.
    """
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        command = [cuobjdump, "-res-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
    spilled = usage["STACK"] + usage["LOCAL"]
    return dict(shared=compiled.metadata.shared, registers=usage["REG"], spilled=spilled)


def show_resources(row):
    tile = " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in row["tile"].items())
    print(
        f"{row['kernel']:26} sm_{row['arch']:<4}{row['dtype']} {row.get('num_warps', 4)} warps "
        f"{row.get('num_stages', 3)} stages{row['shared']:8} B{row['registers']:5} regs"
        f"{row['spilled']:5} B spilled   {tile}",
        flush=True,
    )


def compile_all(quick=False):
    """Every launcher on meta tensors at the paper's shapes, for all architectures; quick: at one
    shape.
    """
    # Functions, where an op has the name:
    from kernels import fir, modconv, mostatt, mostatt_backward  # noqa: F401

    names = ("fir", "modconv", "mostatt", "mostatt_backward")
    module = {name: sys.modules[f"kernels.{name}"] for name in names}
    rows = []
    for arch in ARCHITECTURES:
        module["modconv"].tma_anywhere = arch >= 90
        with CompileOnly(arch) as of_arch:
            for layer in AOT_LAYERS[:1] if quick else AOT_LAYERS:
                launch_all(module, *layer, orders=1 if quick else 3)
        rows += of_arch
    return rows


def launch_all(module, dtype, r, rank, K, N=64, orders=3):
    """Launch every kernel for conv0 of the block at resolution r, forward and backward.

    As training has them: weights, content styles, scores and demodulation in float32, the rest in
    dtype.
    """

    def t(*shape, dtype=dtype):
        x = torch.empty(shape, device="meta", dtype=dtype)
        return x.movedim(-3, -1).contiguous().movedim(-1, -3) if len(shape) > 3 else x

    mostatt, conv, fir = module["mostatt"], module["modconv"], module["fir"]
    I, O = channels(r // 2), channels(r)
    content, s = t(1, O, I, 3, 3, dtype=torch.float32), t(16, I, dtype=torch.float32)
    style = t(N, K, rank, I + 6).contiguous()
    for clips, first in ((s, True), (s, False), (None, False))[:orders]:
        weight, score, demod, peak = mostatt.forward(content, style, clips, dtype, True, first)
        saved = (content, style, clips, score, demod, peak, dtype, first)
        module["mostatt_backward"].backward(weight, score, demod, *saved)
    if rank > 1:
        return
    x, y, bias = t(N, I, r // 2, r // 2), t(N, O, r + 1, r + 1), t(O, dtype=torch.float32)
    same = t(N, O, r // 2, r // 2)
    for mode, tensor in (("up", x), ("down", y), ("same", x), ("flipped", same)):
        conv.conv_launch(tensor, weight, mode)
    conv.conv_launch(x, weight, "same", demod, bias)
    if conv.tma_anywhere:
        conv.conv_tma_launch(x, weight, "up")
        conv.conv_tma_launch(x, weight, "same", demod, bias)
    conv.grad_weight_launch(y, x, 3, "up")
    conv.grad_weight_launch(same, x, 3, "same")
    for up, tensor in ((2, y), (1, t(N, O, r, r))):
        out = fir.epilogue_launch(tensor, demod, bias, up, None)
        fir.epilogue_backward_launch(out, out, demod, bias, up, None)
    for setting in ((1.0, 1, 2, False), (1.0, 2, 1, False), (4.0, 2, 1, True)):
        fir.fir_launch(x, *setting)


MARK = "<!-- made by bench/kernels.py --aot; what follows is overwritten -->\n"


def write_report(path, rows):
    """Puts the table of resources behind the mark in a README: of each kernel, the hungriest
    program.
    """
    import triton

    most = {}
    for row in rows:
        key = row["kernel"], row["dtype"], row["arch"]
        most[key] = max(row, most.get(key, row), key=lambda row: row["registers"])
    spilled = sum(row["spilled"] > 0 for row in rows)
    lines = [
        f"{len(rows)} programs, Triton {triton.__version__}, {date.today()}; {spilled} of them "
        "spill.",
        "A cell is shared memory of a program and registers of a thread, of the program of a "
        "kernel that",
        "needs most registers.",
        "",
        "| kernel | dtype | tile | warps, stages | "
        + " | ".join(f"sm_{a}" for a in ARCHITECTURES)
        + " |",
        "|---|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for name, dtype in sorted({(name, dtype) for name, dtype, _ in most}):
        of_archs = [most.get((name, dtype, arch)) for arch in ARCHITECTURES]
        row = next(row for row in reversed(of_archs) if row)
        edges = [
            (k.removeprefix("BLOCK_"), v) for k, v in row["tile"].items() if k != "MODE" and v != 1
        ]
        tile = " × ".join(f"{value} {edge}" for edge, value in edges)
        cells = [f"{r['shared'] / 1024:.0f} KiB, {r['registers']}" if r else "–" for r in of_archs]
        launch = f"{row.get('num_warps', 4)}, {row.get('num_stages', 3)}"
        lines.append(f"| `{name}` | {dtype} | {tile} | {launch} | {' | '.join(cells)} |")
    above = path.read_text().split(MARK)[0]
    path.write_text(above + MARK + "\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, nargs="+")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--compile-at", type=int, default=64)
    parser.add_argument("--only", help="only ops whose name holds this")
    parser.add_argument("--aot", action="store_true")
    parser.add_argument("--quick", action="store_true", help="with --aot: one shape of each kernel")
    parser.add_argument("--readme", type=Path, help="with --aot: puts the table into this file")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, only to try the program"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = dict(torch=torch.__version__)
    if args.aot:
        rows = compile_all(args.quick)
        write(args.out, result | dict(aot=rows))
        if args.readme is not None:
            write_report(args.readme, rows)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        args.frames = (
            [1]
            if args.dry_run
            else args.frames or ([1, 16, 64, 192] if device == "cuda" else [1, 2])
        )
        args.dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
        result["device"] = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        print(
            result["device"]
            + ("" if device == "cuda" else ": no Triton here, the reference alone at small shapes")
        )
        measure(args, getattr(torch, args.dtype), device, result)


if __name__ == "__main__":
    main()
