"""The ops of kernels/: which implementation runs, what they refuse; the kernels compiled ahead of
time. test_kernels_interpreted.py compares the kernels with their twins.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import reference

pytest.importorskip(
    "triton", reason="Triton is not installed: CUDA tensors take the plain PyTorch ops"
)
ROOT = Path(__file__).parent.parent
SHARED_MEMORY = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes of a program: A100, H100, B200


def run(*command, **environment):
    """Run Python in the repository, without the interpreter unless asked for; its output on
    failure.
    """
    env = (
        {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(ROOT)}
        | environment
    )
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    run("bench/kernels.py", "--aot", "--quick", "--out", out)
    return json.loads(out.read_text())["aot"]


def test_every_kernel_compiles(resources):
    launched = {row["kernel"] for row in resources}
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    written = set(re.findall(r"\ndef _(\w+_kernel)\(", sources))
    assert launched == written
    assert {row["arch"] for row in resources} == set(SHARED_MEMORY)


def test_shared_memory_fits(resources):
    for row in resources:
        assert row["shared"] <= SHARED_MEMORY[row["arch"]], row


def test_no_kernel_spills(resources):
    """And those that keep the sums of a tensor-core loop in registers leave room in the register
    file.
    """
    for row in resources:
        assert row["spilled"] == 0, row
        assert row["registers"] <= 200 or not row["tensor_cores"], row


def test_auto_is_the_default():
    ask = "import kernels; print(kernels.use('auto'))"
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "auto", done.stderr


def test_use():
    before = kernels.use("reference")
    assert kernels.use("triton") == "reference" and kernels.use("auto") == "triton"
    kernels.use(before)
    with pytest.raises(ValueError, match="none of auto, triton and reference"):
        kernels.use("cuda")


def test_cpu_takes_the_twin():
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3, 3, 3)
    assert (
        kernels.summary(torch.device("cpu")) == kernels.chosen(torch.device("cpu")) == "reference"
    )
    assert torch.equal(kernels.conv2d_per_frame(x, weight), reference.conv2d_per_frame(x, weight))
    assert torch.equal(kernels.downsample2d(x), reference.downsample2d(x))


@pytest.mark.parametrize(
    "shape, style, message",
    [
        ((1, 4, 3, 3, 3), (2, 17, 1, 9), "at most 16"),
        ((2, 4, 3, 3, 3), (3, 8, 1, 9), "multiple of B"),
        ((1, 4, 3, 3, 3), (2, 8, 1, 8), "I \\+ 2k"),
    ],
)
def test_mostatt_says_what_it_wants(shape, style, message):
    from kernels.mostatt import mostatt

    with pytest.raises(ValueError, match=message):
        mostatt(torch.zeros(shape), torch.zeros(style))
