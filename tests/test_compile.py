"""torch.compile: a training step as four whole graphs, that compute what the eager step does and
never compile again.

In processes of their own: what is compiled before would change what is counted.
"""

import os
import subprocess
import sys

from conftest import ROOT

COMMON = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import dataclasses
from pathlib import Path
import torch
from conftest import CPU, MODEL, make_config
from torch._dynamo.utils import counters
import mostgan
import train as training
from mostgan.data import Clips
from mostgan.progress import Skips, Stats

BACKEND, DATA = {backend!r}, Path({data!r})


def graphs():
    "How many graphs have been compiled; none of them may be a part of a function."
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]
"""

TRAINING = """
def train(config):
    "Takes a step at each p; returns the state, and how many graphs there were after each step."
    clips, state, counts = Clips(DATA), training.new_state(config, CPU), []
    loop = training.steps(state, config, clips, CPU, Stats(DATA, CPU), Skips(), BACKEND)
    for p in (0.4, 0.0, 0.01, 1.0):
        state.ada_p = p
        next(loop)
        counts.append(graphs())
    loop.close()
    return state, counts


config = make_config(DATA, r1_interval=1, ada_interval=100)
eager, _ = train(config)
compiled, counts = train(dataclasses.replace(config, compile=True))
assert counts == [4] * 4, counts
start = training.new_state(config, CPU)
for network in ("G", "D"):
    states = compiled, eager, start
    ours, theirs, initial = (dict(getattr(s, network).named_parameters()) for s in states)
    for name in ours:
        moved = (theirs[name] - initial[name]).norm()
        assert moved > 0 and (ours[name] - theirs[name]).norm() < 2e-3 * moved, (network, name)
"""

RENDERING = """
def rendered(way):
    return torch.cat(list(mostgan.render(G, 3, clips=2, window=4, **way)), dim=1).float()


G = training.new_state(make_config(DATA), CPU).ema
ways = [dict(start=0, frames=11), dict(start=12345.5, frames=3, step=-0.25),
        dict(start=0, frames=9, loop=6)]
eager = [rendered(way) for way in ways]
G.synthesis.compile(fullgraph=True, dynamic=False, backend=BACKEND)
for frames, way in zip(eager, ways):
    assert (rendered(way) - frames).abs().max() <= 1
assert graphs() == 1
"""


def run_script(script, packed):
    """aot_eager traces and differentiates as Inductor does, but runs the graphs without a minute of
    C++ compilation each; MOSTGAN_COMPILE_BACKEND=inductor takes Inductor.
    """
    backend = os.environ.get("MOSTGAN_COMPILE_BACKEND", "aot_eager")
    common = COMMON.format(root=str(ROOT), data=str(packed), backend=backend)
    command = [sys.executable, "-c", common + script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]


def test_compiled_steps_equal_eager_ones_and_compile_once(packed):
    """Whatever ADA's p, which clips it turns, and the times drawn. Every parameter is compared
    against how far it has moved: Adam divides by the gradient's size, so where a gradient is near
    nothing its rounding shows.
    """
    run_script(TRAINING, packed)


def test_rendering_compiles_once(packed):
    """Windows whole and cut off, at any time and pace, by one graph; and they show what the eager
    ones do.
    """
    run_script(RENDERING, packed)
