"""torch.compile: a training step as three whole graphs, that compute what the eager step does and
never compile again.

Each in a process of its own: what is compiled before would change what is counted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMON = '''
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import dataclasses
from collections import Counter
from pathlib import Path
import torch
import mostgan
from torch._dynamo.utils import counters
import train as training
from mostgan.prepare import pack_sky
from mostgan.config import ModelConfig, TrainConfig
from mostgan.data import Clips, batches
from mostgan.run import Stats

model = ModelConfig(
    resolution=32, channel_base=128, channel_max=8, z_dim=8, w_dim=8, motion_noise_dim=8,
    motion_code_dim=16, num_frequencies=8, motion_vector_dim=4, motion_styles=2,
    motion_resolutions=(16, 32), discriminator_hidden_dim=8, concat_resolution=8,
    motion_distance=16)
pack_sky(Path({data!r}), 32, count=4, frames=40)
clips, cpu = Clips(Path({data!r})), torch.device("cpu")
config = TrainConfig(model, batch_clips=4, batch_split=1, precision="float32", augment="bgc",
                     r1_interval=1, workers=0, seed=1)


torch.manual_seed(0)
BACKEND = {backend!r}


def steps(config, count, p_of_step):
    """G + D + R1 steps; yields the state after each."""
    state, stats = training.new_state(config, cpu), Stats(Path("."), cpu)
    objective = training.objectives(config, BACKEND)
    data = batches(clips, config.batch_clips, model.frames_per_clip, config.seed)
    for _ in range(count):
        state.ada_p = p_of_step(state.step)
        draw = training.Draws(config, clips, cpu, state)
        real = draw.pieces(next(data))
        fakes = training.generator_step(state, draw, objective.generator, config, stats)
        discriminator = objective.discriminator
        training.discriminator_step(state, real, fakes, draw, discriminator, config, stats)
        training.r1_step(state, real, draw, objective.r1, config, stats)
        state.step += 1
        yield state
    data.close()


def graphs():
    """How many graphs have been compiled; none of them may be a part of a function."""
    assert not counters["graph_break"], counters["graph_break"]
    return counters["stats"]["unique_graphs"]
'''


def run_script(script, tmp_path):
    """aot_eager traces and differentiates as Inductor does, but runs the graphs without a minute of
    C++ compilation each; MOSTGAN_COMPILE_BACKEND=inductor takes Inductor.
    """
    backend = os.environ.get("MOSTGAN_COMPILE_BACKEND", "aot_eager")
    common = COMMON.format(root=str(ROOT), data=str(tmp_path / "sky.clips"), backend=backend)
    result = subprocess.run(
        [sys.executable, "-c", common + script], capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("shared", [True, False])
def test_three_compiled_steps_equal_eager_ones(tmp_path, shared):
    """Every parameter, against how far it has moved: Adam divides by the gradient's size, so where
    a gradient is near nothing its rounding shows.
    """
    run_script(
        f"""
config = dataclasses.replace(config, shared_fakes={shared})
*_, eager = steps(dataclasses.replace(config, compile=False), 3, lambda step: 0.4)
*_, compiled = steps(config, 3, lambda step: 0.4)
start = training.new_state(config, cpu)
for network in ("G", "D"):
    ours, theirs, initial = (dict(getattr(state, network).named_parameters())
                             for state in (compiled, eager, start))
    for name in ours:
        moved = (theirs[name] - initial[name]).norm()
        assert moved > 0 and (ours[name] - theirs[name]).norm() < 2e-3 * moved, (network, name)
""",
        tmp_path,
    )


def test_a_step_compiles_once(tmp_path):
    """Three whole graphs, whatever ADA's p, which clips it turns, and the times drawn; and one for
    a generator, at fractional times too.
    """
    run_script(
        """
config = dataclasses.replace(config, batch_split=2, model=dataclasses.replace(model, mbstd_group=2))
counts = [graphs() for _ in steps(config, 5, lambda step: (0.0, 0.01, 0.5, 1.0, 0.0)[step])]
assert counts == [3] * 5, counts
state = training.new_state(config, cpu)
generator = torch.compile(state.G, fullgraph=True, dynamic=False, backend=BACKEND)
z, noise = torch.randn(2, 8), torch.randn(2, 30, 8)
for t in ([[0, 1], [5, 9]], [[0.25, 1.5], [100.75, 101]], [[3, 3], [4, 1e-3]]):
    t = torch.tensor(t, dtype=torch.float64)
    frames = generator(z, t, noise)
    torch.testing.assert_close(frames, state.G(z, t, noise), rtol=1e-4, atol=1e-5)
assert graphs() == 4
""",
        tmp_path,
    )


def test_rendering_compiles_once(tmp_path):
    """Windows whole and cut off, at any time and pace, by one graph; and they show what the eager
    ones do.
    """
    run_script(
        """
G = training.new_state(config, cpu).ema
ways = [dict(start=0, frames=11), dict(start=12345.5, frames=3, step=-0.25),
        dict(start=0, frames=9, loop=6)]
def rendered(way):
    return torch.cat(list(mostgan.render(G, 3, clips=2, window=4, **way)), dim=1).float()


eager = [rendered(way) for way in ways]
G.synthesis.compile(fullgraph=True, dynamic=False, backend=BACKEND)
for frames, way in zip(eager, ways):
    assert (rendered(way) - frames).abs().max() <= 1
assert graphs() == 1
""",
        tmp_path,
    )
