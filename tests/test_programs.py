"""Bad input of every program: one line that says what is wrong, status 2, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from conftest import ROOT, options_of

import sample
import train
from mostgan import program
from mostgan.checkpoint import __main__ as checkpoint
from mostgan.figures import __main__ as figures
from mostgan.files import whole_folder
from mostgan.metrics import __main__ as metrics
from mostgan.prepare import __main__ as prepare
from mostgan.program import cores, run_program

PROGRAMS = {
    "train": lambda: run_program(train.main),
    "sample": lambda: run_program(sample.main),
    "prepare": prepare.main,
    "checkpoint": checkpoint.main,
    "metrics": metrics.main,
    "figures": figures.main,
}
BAD = [
    ("train --dataset mars", "mars"),
    ("train --dataset ffs --preset tiny", "data/ffs"),
    ("train --preset huge", "paper256 or tiny"),
    ("train --preset tiny --data nowhere", "nowhere"),
    ("train --preset tiny --data text.txt", "text.txt"),
    ("train --preset tiny --resolution 100", "power of two"),
    ("train --preset tiny --batch-clips 10", "mbstd_group"),
    ("train --preset tiny --rank 0", "rank"),
    ("train --preset tiny --motion-styles -1", "motion_styles"),
    ("train --preset tiny --augment all", "augment"),
    ("train --preset tiny --precision half", "precision"),
    ("train --preset tiny --generator-lr 0", "generator_lr"),
    ("train --preset tiny --generator-lr inf", "generator_lr"),
    ("train --preset tiny --r1-gamma nan", "r1_gamma"),
    ("train --preset tiny --diversity-weight -1", "diversity_weight"),
    ("train --preset tiny --seed -1", "seed"),
    ("train --preset tiny --seed 99999999999999999999", "seed"),
    ("train --preset tiny --workers -1", "workers"),
    ("train --preset tiny --total-kframes inf", "total_kframes"),
    ("train --preset tiny --total-kframes 0.0001", "total_kframes"),
    ("train --preset tiny --data PACKED --resolution 32 --frames-per-clip 65", "no clip has 65"),
    ("train --preset tiny --data PACKED --conditional --resolution 32", "labels"),
    ("train --preset tiny --data PACKED", "32 pixels"),
    ("train --start-from text.txt", "checkpoint import"),
    ("train --start-from nowhere", "nowhere"),
    ("train --resume nowhere", "nowhere"),
    ("train --resume text.txt", "text.txt"),
    ("train --resume", "no run in runs"),
    ("sample --checkpoint nowhere", "nowhere"),
    ("sample --checkpoint PACKED", "neither a checkpoint"),
    ("sample --checkpoint text.txt", "text.txt is neither a checkpoint"),
    ("sample --psi 1e39", "psi"),
    ("sample --motion-style 0=0 0=2", "style 0 has the gain 0"),
    ("sample --motion-style 0=1e39", "gain"),
    ("prepare nowhere out --resolution 32", "nowhere"),
    ("prepare text.txt out --resolution 32", "text.txt"),
    ("prepare text.txt out", "--resolution"),
    ("prepare --check nowhere", "nowhere"),
    ("checkpoint import nowhere.pkl out", "nowhere.pkl"),
    ("checkpoint import text.txt out", "text.txt"),
    ("checkpoint export nowhere a.pt2", "nowhere"),
    ("checkpoint show nowhere", "nowhere"),
    ("metrics nowhere", "nowhere"),
    ("metrics PACKED nowhere", "nowhere"),
    ("metrics nowhere --runs 0", "runs"),
    ("figures nowhere", "nowhere"),
    ("figures PACKED", "neither a checkpoint"),
]


@pytest.mark.parametrize("command, words", BAD, ids=[command for command, _ in BAD])
def test_bad_input_is_one_clear_line(packed, tmp_path, monkeypatch, capsys, command, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no video, no checkpoint\n")
    name, *arguments = command.replace("PACKED", str(packed)).split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[name]()
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert words in error and error.count("\n") == 1 and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_the_end_of_a_job_is_an_interruption(tmp_path, capsys):
    """So that what was begun is tidied up."""
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with whole_folder(tmp_path / "figures"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as ended:
        run_program(work, "interrupted; nothing was written")
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 130 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


def test_names_that_a_terminal_cannot_print_end_no_program(packed, tmp_path):
    """As an ASCII terminal has it, with a folder whose name is not UTF-8."""
    name = os.fsdecode(b"sky-\xff-\xc3\xa9")
    arguments = options_of(packed, 1, save_minutes=10.0)
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "--out", name]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert b"sample with" in done.stdout and (tmp_path / name / "stats.jsonl").exists()


def test_windows_is_told_of_wsl():
    script = "import sys; sys.platform = 'win32'; import mostgan"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "WSL" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({}, "passive 3000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "passive 7"),
    ],
)
def test_threads_wait_a_moment_unless_the_environment_says_how(chosen, expected):
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    env = {name: value for name, value in os.environ.items() if name not in names} | chosen
    script = f"import os, mostgan; print(*map(os.environ.get, {names}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout.decode().strip() == expected


def test_macos_has_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert cores() == os.cpu_count()


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/job/a", {"job/a/cpu.max": "max 100000", "job/cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/unseen/from/here", {"cpu.max": "200000 100000"}, 2),
        (
            "4:memory:/m\n1:cpu,cpuacct:/job",
            {"cpu/job/cpu.cfs_quota_us": "150000", "cpu/job/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("no such line", {"cpu.max": "100000 100000"}, 8),
        (None, {}, 8),
    ],
)
def test_cores_are_what_control_groups_grant(tmp_path, monkeypatch, groups, files, expected):
    """Of eight cores, by affinity."""
    if groups is not None:
        (tmp_path / "cgroup").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(program, "_quotas", partial(program._quotas, tmp_path / "cgroup", tmp_path))
    assert cores() == expected


def test_nothing_else_asks_for_what_macos_lacks():
    files = [*ROOT.glob("*.py"), *ROOT.glob("mostgan/**/*.py"), *ROOT.glob("kernels/*.py")]
    asking = [path.name for path in files if "sched_getaffinity(" in path.read_text()]
    assert asking == ["program.py"]
