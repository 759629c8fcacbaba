"""The paper's ablations: trains every row of a table with several seeds, scores them, and says
which differences exceed the noise.

    python bench/ablations.py --table 2 --data CLIPS --preset tiny --kframes 30 --seeds 3
    python bench/ablations.py --table where --data CLIPS --rows 0 1 2

Tables 2 to 7 are the paper's; `where` is one that it lacks: where motion styles act, and whose
clips the D step judges. Each run is train.py's own, in the folder --work, and is scored by
mostgan.metrics; as many go side by side as there are GPUs, or cores. Interrupted at any moment, the
same command goes on. A result is of these clips and this budget, and of no others.

A row differs from the reference row where Welch's t-test of their trainings' scores says so at 5 %;
p is after Holm's correction for the number of rows. The last line tells how large a difference so
many trainings show four times in five.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
import tyro

# Before this folder, whose kernels.py is not the package `kernels`.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.timing import describe, frames_trained, write  # noqa: E402
from mostgan.config import UserError, train_preset  # noqa: E402
from mostgan.files import read_json, write_whole  # noqa: E402
from mostgan.prepare.data_sets import open_data, source_fingerprint  # noqa: E402
from mostgan.program import cores, need, run_program  # noqa: E402
from mostgan.progress import read_stats  # noqa: E402
from mostgan.run import lock  # noqa: E402

TIMED = 64  # steps that a row's speed is measured over: its second half has R1 in its share


class Row(NamedTuple):
    name: str
    options: str  # of train.py, beside those of all rows
    paper: str = ""  # its figures


class Table(NamedTuple):
    title: str
    columns: str  # of the paper's figures
    default: int  # the reference row, which the others are compared with
    rows: list


STYLEGAN_V = "--motion-styles 0 --discriminator-hidden-dim 512"
FFS_SKY_CELEBV = "FFS FVD16/128, Sky FVD16/128, CelebV-HQ FVD16/128"
FFS_JELLY_CELEBV = "FFS FVD16/128, RainbowJelly FVD16/128, CelebV-HQ FVD16/128"
TABLES = {
    "2": Table(
        "Number of motion styles",
        FFS_JELLY_CELEBV,
        3,
        [
            Row(
                "K = 0 (StyleGAN-V)",
                f"{STYLEGAN_V} --no-motion-difference",
                "47.4 / 89.3, 195.4 / 262.5, 68.0 / 158.6",
            ),
            Row(
                "K = 1 (without MoStAtt)",
                "--motion-styles 1",
                "50.9 / 104.6, 248.7 / 122.1, 68.4 / 172.0",
            ),
            Row("K = 6", "--motion-styles 6", "46.3 / 83.9, 96.1 / 89.9, 60.8 / 143.5"),
            Row("K = 8", "", "39.7 / 72.6, 70.1 / 74.3, 56.1 / 132.1"),
            Row("K = 10", "--motion-styles 10", "40.4 / 79.8, 77.6 / 77.9, 54.8 / 125.8"),
        ],
    ),
    "3": Table(
        "Modulation order",
        FFS_JELLY_CELEBV,
        0,
        [
            Row(
                "i, content first",
                "",
                "39.76 / 72.64, 70.10 / 74.39, 56.17 / 132.14",
            ),
            Row(
                "ii, motion first",
                "--modulation-order motion_first",
                "65.07 / 150.74, 124.18 / 121.83, 76.85 / 209.90",
            ),
        ],
    ),
    "4": Table(
        "Motion difference",
        "FFS FVD16/128, CelebV-HQ FVD16/128",
        3,
        [
            Row("K = 0", f"{STYLEGAN_V} --no-motion-difference", "47.4 / 89.3, 68.0 / 158.6"),
            Row("K = 0, difference", STYLEGAN_V, "58.1 / 140.6, 88.4 / 204.2"),
            Row("K = 8, no difference", "--no-motion-difference", "49.1 / 117.8, 61.0 / 138.6"),
            Row("K = 8, difference", "", "39.7 / 72.6, 56.1 / 132.1"),
        ],
    ),
    "5": Table(
        "Motion diversity loss",
        FFS_SKY_CELEBV,
        0,
        [
            Row("with", "", "39.7 / 72.6, 65.3 / 162.4, 56.1 / 132.1"),
            Row("without", "--diversity-weight 0", "40.4 / 79.8, 65.8 / 143.2, 58.4 / 166.1"),
        ],
    ),
    "6": Table(
        "Size of the motion vectors",
        FFS_SKY_CELEBV,
        1,
        [
            Row("64", "--motion-vector-dim 64", "72.5 / 153.6, 78.6 / 162.3, 76.3 / 158.0"),
            Row("128", "", "39.7 / 72.6, 65.3 / 162.4, 56.1 / 132.1"),
            Row("256", "--motion-vector-dim 256", "52.4 / 125.9, 74.7 / 161.3, 64.9 / 150.7"),
        ],
    ),
    "7": Table(
        "Rank",
        FFS_SKY_CELEBV,
        0,
        [
            Row("R = 1", "", "39.7 / 72.6, 65.3 / 162.4, 56.1 / 132.1"),
            Row("R = 3", "--rank 3", "40.6 / 70.4, 65.7 / 154.1, 56.6 / 136.9"),
            Row("R = 5", "--rank 5", "39.5 / 74.9, 75.5 / 163.2, 53.8 / 152.8"),
            Row("R = 10", "--rank 10", "37.6 / 64.2, 83.3 / 174.0, 55.7 / 157.6"),
        ],
    ),
    # {all} stands for the resolutions that have motion styles.
    "where": Table(
        "Where motion styles act, and whose clips the D step judges",
        "",
        0,
        [
            Row("weights and demodulation", "--no-shared-fakes"),
            Row("the same, pre-normalized", "--no-shared-fakes --prenorm-resolutions {all}"),
            Row(
                "demodulation only",
                "--no-shared-fakes --motion-demod-only-resolutions {all}",
            ),
            Row(
                "demodulation only, pre-normalized (as the release trains)",
                "--no-shared-fakes --prenorm-resolutions {all}"
                " --motion-demod-only-resolutions {all}",
            ),
            Row("weights and demodulation; D judges the G step's clips", "--shared-fakes"),
        ],
    ),
    "precision": Table(
        "Arithmetic of a training",
        "",
        0,
        [Row("float32", "--precision float32"), Row("bf16", "--precision bf16")],
    ),
}


# ----------------------------------------------------------------------------------------- running


class Plan(NamedTuple):
    """What all runs of a table have in common."""

    data: Path
    preset: str
    kframes: float
    clips: int
    detector: Path | None
    work: Path

    def train_options(self, row):
        of_motion = train_preset(self.preset, "sky").model.motion_resolutions
        options = row.options.replace("{all}", " ".join(map(str, of_motion)))
        return ["--preset", self.preset, "--data", str(self.data), *options.split()]

    def step_kframes(self):
        return train_preset(self.preset, "sky").frames_per_step / 1000

    def folder(self, row, seed):
        """The run's folder; rows of two tables whose options are the same share it."""
        name = "-".join(row.options.replace("{all}", "all").replace("-", " ").split()) or "default"
        return self.work / f"{name}-seed{seed}"


class Runner:
    """Runs programs of this checkout, one at a time on each GPU, or on each core."""

    def __init__(self, jobs):
        gpus = torch.cuda.device_count()
        places = [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(gpus)]
        # One thread each: threads of several programs would wait for each other.
        places = places or [{"OMP_NUM_THREADS": "1"}] * cores()
        self.jobs = jobs or len(places)
        self.places, self.running, self.stopped, self.lock = Queue(), set(), False, Lock()
        for number in range(self.jobs):
            self.places.put(places[number % len(places)])

    def __call__(self, words, log):
        """Runs `python words`, its output added to the file `log`. UserError where it fails."""
        place = self.places.get()
        try:
            with open(log, "ab") as output:
                begun = output.tell()
                command = [sys.executable, *map(str, words)]
                options = dict(cwd=ROOT, env=os.environ | place, stdout=output, stderr=output)
                with self.lock:
                    if self.stopped:
                        raise UserError("stopped")
                    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
                    self.running.add(child)
                status = child.wait()
                self.running.discard(child)
        finally:
            self.places.put(place)
        if status:
            lines = Path(log).read_bytes()[begun:].decode(errors="replace").splitlines()
            said = [line for line in lines if "error: " in line.lower()] or [f"status {status}"]
            raise UserError(f"a run failed, see {log}: {said[-1]}")

    def stop(self):
        """Has every program that runs save its state and end, and starts no other."""
        with self.lock:
            self.stopped = True
            for child in list(self.running):
                child.terminate()


def quiet_rate(run, plan, row):
    """Frames per second of a row's training, alone on the machine, measured once."""
    folder, total = plan.folder(row, "timing"), TIMED * plan.step_kframes()
    if not (finished(folder, total) and read_stats(folder)):
        shutil.rmtree(folder, ignore_errors=True)  # a part of it alone would be another rate
        arguments = [*plan.train_options(row), "--total-kframes", total, "--log-kframes", total / 2]
        run(["train.py", *arguments, "--out", folder], folder.with_suffix(".log"))
        if not finished(folder, total):
            raise UserError(f"{folder.name} has stopped early; the same command goes on")
    return read_stats(folder)[-1]["frames_per_second"]


def finished(folder, kframes):
    """Whether the run in a folder has come to its end."""
    return frames_trained(folder) >= round(1000 * kframes)


def train_and_score(run, plan, row, seed):
    """The scores of one training, name → value; what is done already is not done again."""
    folder = plan.folder(row, seed)
    log, total = folder.with_suffix(".log"), f"{plan.kframes:g}"
    detector = plan.detector.stem if plan.detector else "proxy"
    scores = folder / f"scores-{total}k-{plan.clips}-{detector}.json"
    if not read_json(scores).get("results"):
        if finished(folder, plan.kframes + plan.step_kframes()):
            raise UserError(
                f"{folder.name} was trained for longer than {total} k frames: score it at its "
                "length, or give this table a --work of its own"
            )
        arguments = [*plan.train_options(row), "--seed", seed, "--total-kframes", total]
        start = ["--resume", folder] if (folder / "config.json").exists() else ["--out", folder]
        run(["train.py", *arguments, *start], log)
        if not finished(folder, plan.kframes):  # stopped by a signal it ends as if it was done
            raise UserError(f"{folder.name} has stopped early; the same command goes on")
        words = ["-m", "mostgan.metrics", folder, "--data", plan.data, "--clips", plan.clips]
        words += ["--runs", 3, "--long-clips", 0, "--out", scores]
        run(words + (["--detector", plan.detector] if plan.detector else []), log)
    return {name: of["mean"] for name, of in read_json(scores)["results"].items()}


# --------------------------------------------------------------------------------------- comparing


def compare(rows, default):
    """Adds to each row what Welch's t-test says of it and the reference row: p after Holm's
    correction, and whether they differ at 5 %. The score is the first one, FVD16.
    """
    from scipy import stats

    others = [row for row in rows if row is not default and len(row["scores"]) > 1]
    if len(default["scores"]) < 2:
        others = []
    for row in others:
        row["p"] = float(stats.ttest_ind(of_runs(row), of_runs(default), equal_var=False).pvalue)
    corrected = 0.0
    for tests, row in zip(range(len(others), 0, -1), sorted(others, key=lambda row: row["p"])):
        row["p"] = corrected = max(corrected, min(1.0, row["p"] * tests))
        row["differs"] = corrected < 0.05


def of_runs(row, name=None):
    """A row's values of a score, by default of the first one, over its trainings."""
    return [scores[name or next(iter(scores))] for scores in row["scores"]]


def visible_difference(rows):
    """How much a row must differ to be told from the reference row four times in five, if all rows
    deviate alike, and it is the one that differs most (Holm's first test); None where some row has
    too few trainings. By drawing such scores and testing them.
    """
    from scipy import optimize, stats

    n = min(len(row["scores"]) for row in rows)
    if n < 2 or len(rows) < 2:
        return None
    spread = math.sqrt(statistics.mean(statistics.variance(of_runs(row)) for row in rows))
    one, other = np.random.default_rng(0).normal(size=(2, 4000, n))

    def missed(difference):
        p = stats.ttest_ind(one + difference, other, axis=1, equal_var=False).pvalue
        return 0.8 - np.mean(p < 0.05 / (len(rows) - 1))

    return spread * float(optimize.brentq(missed, 0, 1e4, xtol=0.01))


def markdown(result):
    """The result as a table in Markdown, with what it is of and what it shows."""
    rows, names = result["rows"], list(result["rows"][0]["scores"][0])
    shown = [name for name in names if "fvd16" in name or "spectr" in name] or names[:1]
    head = ["", *shown, "trainings", "minutes each", "differs from the reference"]
    if result["columns"]:
        head.append(f"paper: {result['columns']} (other data, I3D)")
    lines = [f"**{result['title']}** ({result['about']})", "", "| " + " | ".join(head) + " |"]
    lines.append("|---" * len(head) + "|")
    for row in rows:
        cells = [row["name"]]
        for name in shown:
            values = of_runs(row, name)
            std = f" ± {rounded(statistics.stdev(values), 2)}" if len(values) > 1 else ""
            cells.append(rounded(statistics.mean(values), 3) + std)
        test = "the reference" if row["default"] else "too few trainings"
        if "p" in row:
            test = f"{'yes' if row['differs'] else 'no'} (p = {row['p']:.2g})"
        cells += [str(len(row["scores"])), rounded(row["minutes"], 2), test]
        if result["columns"]:
            cells.append(row["paper"] or "–")
        lines.append("| " + " | ".join(cells) + " |")
    if result["visible_difference"] is not None:
        seen = rounded(result["visible_difference"], 2)
        told = f"So many trainings show a difference of {seen} in {shown[0]}, 4 times in 5"
        lines += ["", f"{told}, if all rows deviate alike."]
    return "\n".join(lines)


def rounded(number, count):
    """A number with so many digits that count, and without an exponent."""
    return f"{float(f'{number:.{count}g}'):,.12f}".rstrip("0").rstrip(".")


# ------------------------------------------------------------------------------------- command line


def ablate(
    table: str,
    data: Path,
    preset: str = "tiny",
    kframes: float = 30,
    seeds: int = 3,
    rows: tuple[int, ...] = (),
    clips: int = 512,
    detector: Path | None = None,
    jobs: int | None = None,
    work: Path | None = None,
    out: Path | None = None,
):
    """Trains, scores and compares the rows of one table.

    Args:
        table: 2, 3, 4, 5, 6, 7, where or precision.
        data: clips to train on and to score against, as train.py takes them; what is not packed
            yet is packed first.
        preset: size preset: tiny or paper256.
        kframes: length of each training, in thousands of frames; a longer one goes on from a
            shorter one.
        seeds: trainings of each row.
        rows: numbers of the rows, from 0; default all.
        clips: generated clips that a score is of, three times.
        detector: the TorchScript file of I3D, for FVD; default a random network, called proxy.
        jobs: runs side by side; default one on each GPU, or on each core.
        work: the folder of the runs, of these data and this preset alone; default
            runs/ablations/PRESET-DATA-DIGITS.
        out: the JSON file; default table-TABLE-KFRAMESk.json in the folder of the runs, with the
            numbers of the rows where they are chosen. The table is printed, and written beside it
            as .md.
    """
    need("scipy", "dev")
    if table not in TABLES:
        raise UserError(f"--table {table} is not known: choose from {', '.join(TABLES)}")
    chosen = TABLES[table]
    if wrong := [number for number in rows if not 0 <= number < len(chosen.rows)]:
        raise UserError(f"--rows {wrong[0]}: table {table} has rows 0 to {len(chosen.rows) - 1}")
    if seeds < 1 or not 0 < kframes < math.inf or clips < 2 or (jobs is not None and jobs < 1):
        raise UserError("--seeds and --jobs must be at least 1, --clips 2, --kframes more than 0")
    for option, path in (("data", data), ("detector", detector)):
        if path is not None and not path.exists():
            raise UserError(f"--{option} {path} does not exist")
    if out is not None and (out.suffix != ".json" or out.is_dir()):
        raise UserError(f"--out {out}: the result is one JSON file, so name one, NAME.json")
    numbers = sorted({chosen.default, *rows}) if rows else range(len(chosen.rows))
    open_data(data, "sky", train_preset(preset, "sky").model.resolution)
    digits = source_fingerprint(data.resolve())
    work = work or Path("runs", "ablations", f"{preset}-{data.resolve().name}-{digits}")
    of_rows = "".join(f"-{number}" for number in numbers) if rows else ""
    out = out or work / f"table-{table}{of_rows and '-rows' + of_rows}-{kframes:g}k.json"
    for folder in (work, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    of = {"data": digits, "preset": preset}
    if (before := read_json(work / "of.json") or of) != of:
        raise UserError(f"{work} has runs of other clips or another preset {before}: name another")
    lock(work, "--work")
    write_whole(work / "of.json", json.dumps(of) + "\n")
    detector = detector and detector.resolve()  # programs run in the checkout
    plan = Plan(data.resolve(), preset, kframes, clips, detector, work.resolve())
    trained = train_all(plan, [chosen.rows[number] for number in numbers], seeds, jobs)
    for number, row in zip(numbers, trained):
        row["default"] = number == chosen.default
    compare(trained, next(row for row in trained if row["default"]))
    result = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about = f"{preset}, {kframes:g} k frames of {data.name}, {result['date']}"
    result |= {"command": " ".join(sys.argv), "title": chosen.title, "columns": chosen.columns}
    result |= {"about": about, "rows": trained, "visible_difference": visible_difference(trained)}
    print(markdown(result))
    write(out, result)
    write_whole(out.with_suffix(".md"), markdown(result) + "\n")


def train_all(plan, rows, seeds, jobs):
    """Each row with its scores and its cost: all quiet timings first, then the trainings. UserError
    where some of them failed, after the others.
    """
    run = Runner(jobs)
    pool = ThreadPoolExecutor(run.jobs)
    try:
        trained, failed = [], []
        for row in rows:
            minutes = 1000 * plan.kframes / quiet_rate(run, plan, row) / 60
            trained.append(dict(name=row.name, options=row.options, paper=row.paper))
            trained[-1] |= {"minutes": minutes, "scores": []}
            print(f"{row.name}: {minutes:.1f} minutes each", flush=True)
        # Seed by seed, so that an interrupted table has all rows alike.
        jobs = [
            (number, seed, pool.submit(train_and_score, run, plan, row, seed))
            for seed in range(seeds)
            for number, row in enumerate(rows)
        ]
        for number, seed, job in jobs:
            name = f"{trained[number]['name']}, seed {seed}"
            try:
                trained[number]["scores"].append(job.result())
                print(f"{name}: {job.result()}", flush=True)
            except UserError as error:
                failed.append(f"{name}: {error}")
                print(failed[-1], flush=True)
        if failed:
            raise UserError(f"{failed[0]}; {len(failed)} failed, the same command tries them again")
        return trained
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        run.stop()


if __name__ == "__main__":
    run_program(
        lambda: tyro.cli(ablate, description=__doc__), "interrupted; the same command goes on"
    )
