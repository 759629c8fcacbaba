"""How an implementation is chosen (kernels/choose.py), without a GPU: candidates are plain
functions on a CPU.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch

import kernels
from kernels import choose
from kernels.choose import PLAIN, Choices, Op, Unsuitable

ROOT = Path(__file__).parent.parent
KEY = {"device": "test"}
x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def candidates_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(choose, "devices", {"cpu"})
    monkeypatch.setattr(choose, "mode", "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choose.choices.cache_clear()
    yield
    choose.choices.cache_clear()


def twin(x):
    time.sleep(0.01)
    return 2 * x


def fast(x):
    return x + x


def slow(x):
    time.sleep(0.03)
    return x + x


def broken(x):
    raise RuntimeError("no such instruction\nand more")


def greedy(x):
    raise torch.OutOfMemoryError("tried to allocate")


def unsuitable(x):
    raise Unsuitable("needs another device")


BAD = {
    "broken": (broken, "RuntimeError: no such instruction"),
    "wrong": (lambda x: 2.2 * x, "result 0 is wrong by 1.0e-01"),
    "nan": (lambda x: x * float("nan"), "result 0 is wrong by nan"),
    "one nan": (
        lambda x: torch.where(x == x.max(), float("nan"), 2 * x),
        "result 0 is wrong by nan",
    ),
    "half": (lambda x: (2 * x).bfloat16(), "has dtype torch.bfloat16"),
    "short": (lambda x: 2 * x[:3], "has shape"),
    "other order": (lambda x: (2 * x).t().contiguous().t(), "has strides"),
    "greedy": (greedy, "out of memory"),
}


def counted(function, calls):
    def call(x):
        calls.append(function)
        return function(x)

    return call


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_dropped_and_named_once(name, tmp_path, caplog):
    function, reason = BAD[name]
    table = Choices(tmp_path, KEY)
    op = Op("double", twin, {"Triton": function, "cuDNN": fast})
    for _ in range(3):
        assert table.of(op, (x,)) == "cuDNN"
    (row,) = table.rows.values()
    assert reason in row["dropped"]["Triton"] and "Triton" not in row["ms"]
    named = [
        record
        for record in caplog.records
        if "Triton is not used for double 4×3:float32" in record.message
    ]
    assert len(named) == 1 and reason in named[0].message


def test_the_fastest_is_chosen_and_the_slow_is_not_dropped(tmp_path):
    table = Choices(tmp_path, KEY)
    assert table.of(Op("double", twin, {"Triton": slow, "cuDNN": fast}), (x,)) == "cuDNN"
    (row,) = table.rows.values()
    assert row["dropped"] == {} and row["ms"]["Triton"] > 25 > row["ms"][PLAIN] > row["ms"]["cuDNN"]
    assert row["error"] == {"Triton": 0, "cuDNN": 0, PLAIN: 0}


def test_the_twin_serves_where_everything_else_is_wrong(tmp_path):
    table = Choices(tmp_path, KEY)
    assert table.of(Op("double", twin, {"Triton": broken, "cuDNN": BAD["wrong"][0]}), (x,)) == PLAIN


def test_what_is_not_made_for_a_device_is_not_in_the_log(tmp_path, caplog):
    table = Choices(tmp_path, KEY)
    assert (
        table.of(Op("double", twin, {"Triton TMA": unsuitable, "Triton": fast}), (x,)) == "Triton"
    )
    (row,) = table.rows.values()
    assert (
        row["dropped"] == {"Triton TMA": "not suitable: needs another device"}
        and not caplog.records
    )


def test_deterministic_programs_take_the_first_that_is_right(tmp_path):
    op = Op("double", twin, {"Triton TMA": broken, "Triton": slow, "cuDNN": fast})
    torch.use_deterministic_algorithms(True)
    try:
        assert Choices(tmp_path, KEY).of(op, (x,)) == "Triton"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_second_start_measures_nothing(tmp_path):
    calls = []
    op = Op(
        "double",
        counted(twin, calls),
        {"Triton": counted(fast, calls), "cuDNN": counted(slow, calls)},
    )
    first = Choices(tmp_path, KEY)
    assert first.of(op, (x,)) == "Triton" and calls
    assert first.summary() == "1 of 1 Triton (measured now)"
    calls.clear()
    second = Choices(tmp_path, KEY)
    assert second.of(op, (x,)) == "Triton" and not calls
    assert second.summary() == "1 of 1 Triton (measured before)"
    assert second.of(op, (x[:2],)) == "Triton" and calls  # another shape is another row
    assert second.summary() == "2 of 2 Triton (1 measured now)"
    assert second.of(op, (x.bfloat16(),)) == "Triton" and len(second.rows) == 3


def test_summary_counts_kinds(tmp_path):
    table = Choices(tmp_path, KEY)
    assert table.summary() == PLAIN
    names = [("Triton TMA", 3), ("Triton", 8), ("cuDNN grouped", 2)]
    for i, name in enumerate(name for name, count in names for _ in range(count)):
        table.of(Op(f"op {i}", twin, {name: fast}), (x,))
    assert table.summary() == "11 of 13 Triton, 2 cuDNN (measured now)"


def test_without_memory_for_the_twin_nothing_is_remembered(tmp_path, caplog):
    table = Choices(tmp_path, KEY)
    assert table.of(Op("double", greedy, {"Triton": fast}), (x,)) == PLAIN
    assert table.rows == {} and "no memory to compare" in caplog.text


def test_nothing_that_the_race_allocates_stays(tmp_path):
    made = []

    def remembered(function):
        def call(x):
            y = function(x)
            made.append(weakref.ref(y))
            return y

        return call

    op = Op(
        "double",
        remembered(twin),
        {"Triton": remembered(fast), "cuDNN": remembered(BAD["wrong"][0])},
    )
    Choices(tmp_path, KEY).of(op, (x,))
    gc.collect()
    assert len(made) > 5 and not any(reference() is not None for reference in made)


# the table on disk


def saved(folder):
    (path,) = folder.glob("*.json")
    return path, json.loads(path.read_text())


TABLE = '{"key": {"device": "test"}'


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "\0\0",
        TABLE + "}",
        TABLE + ', "rows": [1]}',
        TABLE + ', "rows": {"double 4×3:float32": {"ms": 3}}}',
    ],
)
def test_a_damaged_table_is_measured_anew(tmp_path, caplog, damage):
    op = Op("double", twin, {"Triton": fast})
    Choices(tmp_path, KEY).of(op, (x,))
    path, whole = saved(tmp_path)
    path.write_text(damage)
    table = Choices(tmp_path, KEY)
    assert "cannot be read" in caplog.text and table.rows == {}
    assert (
        table.of(op, (x,)) == "Triton" and saved(tmp_path)[1]["rows"].keys() == whole["rows"].keys()
    )
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_table_of_another_device_is_not_used(tmp_path, caplog):
    op = Op("double", twin, {"Triton": fast, "cuDNN": slow})
    Choices(tmp_path, KEY).of(op, (x,))
    other = Choices(tmp_path, {"device": "another"})
    assert other.rows == {} and not caplog.records
    other.path.write_text(saved(tmp_path)[0].read_text())  # copied by hand
    assert Choices(tmp_path, {"device": "another"}).rows == {} and "another device" in caplog.text


def test_a_folder_that_cannot_be_written_is_named_once(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = Choices(tmp_path / "file" / "cache", KEY)
    caplog.clear()
    op = Op("double", twin, {"Triton": fast})
    assert table.of(op, (x,)) == table.of(op, (x[:2],)) == "Triton"
    assert caplog.text.count("cannot be written") == 1


def test_only_the_first_of_several_processes_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    op = Op("double", twin, {"Triton": fast})
    assert Choices(tmp_path, KEY).of(op, (x,)) == "Triton" and not list(tmp_path.glob("*.json"))
    monkeypatch.setenv("RANK", "0")
    Choices(tmp_path, KEY).of(op, (x,))
    monkeypatch.setenv("RANK", "1")
    assert len(Choices(tmp_path, KEY).rows) == 1  # but all read


def test_a_candidate_that_takes_the_process_down_is_dropped_at_the_next_start(tmp_path, caplog):
    script = f"""
import os, torch
from kernels.choose import Choices, Op
candidates = {{"Triton TMA": lambda x: os.abort(), "Triton": lambda x: x + x}}
op = Op("double", lambda x: 2 * x, candidates)
table = Choices({str(tmp_path)!r}, {{"device": "test"}})
print(table.of(op, (torch.ones(4, 3),)), table.rows)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert first.returncode < 0
    (row,) = saved(tmp_path)[1]["rows"].values()
    assert row["trying"]["name"] == "Triton TMA"
    second = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert second.returncode == 0 and "Triton TMA is not used" in second.stderr, second.stderr
    (row,) = saved(tmp_path)[1]["rows"].values()
    assert (
        row["dropped"] == {"Triton TMA": "the process that tried it ended there"}
        and "trying" not in row
    )


def test_what_a_living_process_tries_is_not_dropped(tmp_path):
    table = Choices(tmp_path, KEY)
    op = Op("double", twin, {"Triton": fast})
    parent = f"{os.uname().nodename} {os.getppid()}"
    row = {"ms": {}, "error": {}, "dropped": {}, "trying": {"name": "Triton", "process": parent}}
    table.rows = {choose.describe(op, (x,)): row}
    table._write()
    assert Choices(tmp_path, KEY).of(op, (x,)) == "Triton"


def test_stopped_by_ctrl_c_a_candidate_is_not_dropped(tmp_path):
    def stopped(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Choices(tmp_path, KEY).of(Op("double", twin, {"Triton": stopped}), (x,))
    assert Choices(tmp_path, KEY).of(Op("double", twin, {"Triton": fast}), (x,)) == "Triton"


def test_a_broken_device_ends_the_program_and_the_next_start_goes_on(tmp_path, monkeypatch):
    def illegal(x):
        monkeypatch.setattr(choose, "synchronize", lambda: broken(x))
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="Triton broke the device"):
        Choices(tmp_path, KEY).of(Op("double", twin, {"Triton": illegal, "cuDNN": fast}), (x,))
    monkeypatch.undo()
    (row,) = saved(tmp_path)[1]["rows"].values()
    assert row["trying"]["name"] == "Triton" and row["dropped"] == {}  # cuDNN is not to blame
    table = Choices(tmp_path, KEY)
    assert (
        table.of(Op("double", twin, {"Triton": fast, "cuDNN": slow}), (x,)) == PLAIN
        or "Triton" not in table.rows
    )
    (row,) = table.rows.values()
    assert row["dropped"] == {"Triton": "the process that tried it ended there"}


def test_python_m_kernels_prints_the_table(tmp_path):
    folder = choose.cache_folder()
    Choices(folder, KEY).of(Op("double", twin, {"Triton": fast, "cuDNN": broken}), (x,))
    (folder / "damaged.json").write_text("{")
    done = subprocess.run(
        [sys.executable, "-m", "kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert any("double 4×3:float32" in line for line in lines)
    assert any(line.split()[:2] == ["*", "Triton"] and "error 0.0e+00" in line for line in lines)
    assert any(
        "cuDNN" in line and "dropped" in line and "no such instruction" in line for line in lines
    )
    assert any("damaged.json cannot be read" in line for line in lines)


# in the networks


def test_in_a_compiled_function():
    """Chosen at the first real call; what is compiled does not change with the choice."""
    calls = []
    op = Op("double", twin, {"Triton": broken, "cuDNN": counted(fast, calls)})

    @torch.library.custom_op("test_choose::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return op(x)

    double.register_fake(lambda x: torch.empty_like(x))
    compiled = torch.compile(lambda x: double(x + 1) * 3, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), 6 * (x + 1)) and calls
    calls.clear()
    assert torch.allclose(compiled(-x), 6 * (1 - x)) and len(calls) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_generator_with_auto_equals_the_plain_one(compiled, monkeypatch, caplog):
    """Every op races on a CPU, where Triton's candidates raise; one candidate that runs there is
    wrong by 10%.
    """
    pytest.importorskip("triton")
    from test_model import make

    from kernels import modconv

    def no_driver(*args):
        raise RuntimeError("0 active drivers")

    names = ("kernels.mostatt", "kernels.mostatt_backward", "kernels.fir", "kernels.modconv")
    for module in map(importlib.import_module, names):
        for op in [value for value in vars(module).values() if isinstance(value, Op)]:
            for name in op.candidates:
                if name.startswith("Triton"):  # which Triton's interpreter would run, for minutes
                    monkeypatch.setitem(op.candidates, name, no_driver)
    grouped = modconv.CONV.candidates["cuDNN grouped"]
    monkeypatch.setitem(
        modconv.CONV.candidates, "cuDNN grouped", lambda *args: 1.1 * grouped(*args)
    )
    G = make(motion_styles=3).train().requires_grad_(True)
    z, noise, t = (
        torch.randn(2, 32),
        torch.randn(2, 30, 32),
        torch.tensor([[0.0, 5], [1, 2]], dtype=torch.float64),
    )
    results = []
    for choice in ("reference", "auto"):
        kernels.use(choice)
        run = (
            torch.compile(G, fullgraph=True, backend="aot_eager")
            if compiled and choice == "auto"
            else G
        )
        frames = run(z, t, noise)
        frames.square().sum().backward()
        results.append(
            [frames.detach(), *(p.grad.clone() for p in G.parameters() if p.grad is not None)]
        )
        G.zero_grad()
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 1e-4 * plain.norm() + 1e-7
    names = set(choose.choices().used)
    assert {name.split()[0] for name in names} >= {
        "mostatt",
        "mostatt_backward",
        "epilogue",
        "conv2d_per_frame",
    }
    assert (
        "cuDNN grouped is not used for conv2d_per_frame" in caplog.text
        and "wrong by 1.0e-01" in caplog.text
    )
