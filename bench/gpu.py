"""The measurements that need a GPU, in parts: `bash bench/gpu.sh` runs this with its caches in one
folder.

    sample    ms per frame, and frames brought to host memory
    train     a training step, phase by phase, R1 last
    tests     every kernel against its plain PyTorch twin, in parallel processes
    kernels   every op at the paper's shapes, beside its floor

Without names all parts run, in this order. Each has a limit of at most 8 minutes, all together of
24. A part writes <out>/<part>.json row by row and <out>/<part>.log, so that being cut off loses one
row. It needs torch, triton, numpy, safetensors and pytest. Parts that have run are gathered in
<out>/<device>.json, and a table compares what was reached with the target, and with the floor that
the same run measured.

--dry-run runs all of it on a CPU in tiny shapes, with torch.compile's aot_eager backend, and
without the packages that a bare machine lacks: only to find mistakes in these programs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"sample": 360, "train": 480, "tests": 300, "kernels": 300}  # seconds that each may take
KERNELS = "tests/test_kernels_interpreted.py"
TESTS = {  # name → pytest's arguments
    "mostatt, content first": [
        "tests/test_kernels_interpreted.py",
        "-k",
        "mostatt and content_first",
    ],
    "mostatt, the rest": [
        "tests/test_kernels_interpreted.py",
        "-k",
        "mostatt and not content_first",
    ],
    "epilogue": [KERNELS, "-k", "test_epilogue"],
    "fir": [KERNELS, "-k", "test_fir"],
    "modconv": [KERNELS, "-k", "test_modconv"],
    "generator": [KERNELS, "-k", "test_generator"],
    "choose": ["tests/test_choose.py"],
}
TARGETS = {
    "ms_per_frame": 0.15,
    "frames_per_second": 580,
    "mostatt": 0.8,
}  # an H100 at 256²; of the byte floor


def command_of(part, out, dry):
    """The program of a part that is a benchmark of its own."""
    program = {"sample": "ms_per_frame.py", "train": "train_step.py", "kernels": "kernels.py"}[part]
    options = {
        "sample": ["--frames", "64", "16", "1", "--repeats", "3"],
        "train": ["--kernels", "auto", "reference"],
        "kernels": ["--frames", "64", "--compile-at", "0"],
    }
    chosen = ["--dry-run"] if dry else options[part]
    return [sys.executable, f"bench/{program}", *chosen, "--out", str(out / f"{part}.json")]


def run_part(part, out, dry):
    """Runs a part within its limit, its output shown and kept. Returns what failed, or None."""
    started, limit = time.monotonic(), PARTS[part]
    with open(out / f"{part}.log", "w") as log:
        if part == "tests":
            failed = run_tests(out, log, limit, dry)
        else:
            failed = run_command(command_of(part, out, dry), log, limit)
    print(
        f"== {part}: {time.monotonic() - started:.0f} s of at most {limit}, {failed or 'passed'}",
        flush=True,
    )
    return failed and f"{part}: {failed}, see {out / f'{part}.log'}"


def run_command(command, log, limit):
    """Runs a program, its lines shown as they come. Returns what failed, or None."""
    print(f"== {' '.join(command[1:])}", flush=True)
    shown = subprocess.Popen(
        ["timeout", "--kill-after=10", str(limit), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in shown.stdout:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()
    status = shown.wait()
    return {0: None, 124: "cut off by its limit"}.get(status, f"exit status {status}")


def run_tests(out, log, limit, dry):
    """Runs all test processes at once; writes a row as each of them ends. Returns what failed, or
    None.
    """
    chosen = {"choose": [*TESTS["choose"], "-k", "wrong or fastest"]} if dry else TESTS
    running, rows = {}, []
    for name, arguments in chosen.items():
        path = out / f"tests-{name.split(',')[0]}-{len(running)}.log"
        command = [
            "timeout",
            str(limit),
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--noconftest",  # which needs PyAV
            "-p",
            "no:cacheprovider",
        ]
        with open(path, "w") as file:
            running[name] = (
                subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=file, stderr=file),
                path,
            )
    while running:
        time.sleep(0.2)
        for name, (process, path) in list(running.items()):
            if process.poll() is None:
                continue
            text = path.read_text()
            last = (text.strip().splitlines() or ["no output"])[-1]
            rows.append({"tests": name, "passed": process.returncode == 0, "summary": last})
            write(out / "tests.json", {"rows": rows})
            print(
                f"{name:26} {'passed' if process.returncode == 0 else 'FAILED'}: {last}", flush=True
            )
            log.write(f"==== {name}\n{text}\n")
            path.unlink()
            del running[name]
    wrong = [row["tests"] for row in rows if not row["passed"]]
    return f"failed: {', '.join(wrong)}" if wrong else None


def write(path, result):
    path.write_text(json.dumps(result, indent=1) + "\n")


def gather(out):
    """All parts that have been written, in one file named after the device. Returns them."""
    parts = {
        part: json.loads((out / f"{part}.json").read_text())
        for part in PARTS
        if (out / f"{part}.json").exists()
    }
    names = [part["device"] for part in parts.values() if "device" in part]
    if names:
        path = out / f"{names[0].split(',')[0].lower().replace(' ', '-')}.json"
        write(path, parts)
        print(f"wrote {path}: {', '.join(parts)}")
    return parts


def table(parts):
    """What was reached, the target, and the floor that bytes and arithmetic set in the same run."""
    lines = []
    rows = [row for row in parts.get("sample", {}).get("rows", []) if "ms_per_frame" in row]
    if rows:
        best = min(rows, key=lambda row: row["ms_per_frame"])
        floor = best.get("floor_ms")
        lines.append(
            ("sampling, ms/frame", best["ms_per_frame"], f"≤ {TARGETS['ms_per_frame']}", floor)
        )
    rows = [row for row in parts.get("train", {}).get("rows", []) if "frames_per_second" in row]
    if rows:
        best = max(rows, key=lambda row: row["frames_per_second"])
        floor = best.get("ceiling_frames_per_second")
        target = f"≥ {TARGETS['frames_per_second']}"
        lines.append(("training, frames/s", best["frames_per_second"], target, floor))
    for row in parts.get("kernels", {}).get("rows", []):
        if row["op"] == "mostatt" and row.get("triton_ms"):
            target = f"≤ {row['floor_ms'] / TARGETS['mostatt']:.4f}"
            lines.append((f"MoStAtt {row['layer']}, ms", row["triton_ms"], target, row["floor_ms"]))
    print(f"\n{'':32}{'reached':>12}{'target':>12}{'floor':>12}")
    for name, reached, target, floor in lines:
        print(
            f"{name:32}{reached:12.4f}{target:>12}" + (f"{floor:12.4f}" if floor else f"{'–':>12}")
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    import torch

    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["MOSTGAN_BENCH_BARE"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("gpu.sh: there is no GPU here; --dry-run tries the programs without one")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    failed = [run_part(part, out, args.dry_run) for part in args.parts or PARTS]
    table(gather(out))
    failed = [line for line in failed if line]
    print("\n".join(failed) or "nothing failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
