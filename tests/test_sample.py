"""sample.py: its options, its files, being stopped; memory over many frames."""

import dataclasses
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import make
from test_video import comment_in, frames_in

import sample as program
from mostgan import checkpoint
from mostgan.config import UserError

ROOT = Path(__file__).parent.parent


def save(folder, generator):
    checkpoint.save(folder, 0, generator.config, generator.state_dict(), {}, {})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint of random weights; without config.json, so at 25 frames per
    second.
    """
    folder = tmp_path_factory.mktemp("run")
    save(folder, make())
    return folder


@pytest.fixture
def sample(run, tmp_path):
    """sample(**options) → uint8 [frames, H, W, 3] of the npy that it writes."""

    def call(**options):
        out = tmp_path / "sample.npy"
        assert program.sample(
            program.Options(
                **{"checkpoint": run, "out": out, "force": True, "frames": 20} | options
            )
        )
        return np.load(out)

    return call


def clip(frames, row=0, column=0):
    return frames[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32].astype(int)


# options


def test_defaults(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert program.sample(program.Options(run))
    out = Path("samples", f"{run.name}-seed0.mp4")
    assert len(frames_in(out)) == 256
    printed = capsys.readouterr().out
    assert "256 frames of 1 clip" in printed and all(
        word in printed for word in ("ms/frame", "rendering", "transfer", "encoding")
    )
    # The same command again takes another name; one that is given must be free, or forced.
    before = out.read_bytes()
    assert program.sample(program.Options(run, frames=4))
    assert len(frames_in(Path("samples", f"{run.name}-seed0-2.mp4"))) == 4
    with pytest.raises(UserError, match="--force"):
        program.sample(program.Options(run, out))
    assert out.read_bytes() == before
    assert program.sample(program.Options(run, frames=4, force=True))
    assert len(frames_in(out)) == 4


def test_pieces_joined_are_the_whole(sample):
    options = {"grid": "1x2", "rows": "content", "speed": 0.3}
    whole = sample(frames=50, start=7, **options)
    pieces = [
        sample(frames=n, start=7 + round(0.3 * first, 6), **options)
        for first, n in ((0, 13), (13, 30), (43, 7))
    ]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_a_loop_repeats(sample, capsys):
    frames = sample(frames=47, loop=0.8)  # 20 frames at 25 frames per second
    assert (
        np.array_equal(frames[20:], frames[:27])
        and len(np.unique(frames[:20].reshape(20, -1), axis=0)) == 20
    )
    said = "a loop of 20 frames (0.8 s) goes through 1 motion anchor, 16 frames apart: speed 0.8"
    assert said in capsys.readouterr().out
    assert len(sample(frames=None, loop=2)) == 50
    capsys.readouterr()
    sample(frames=1, loop=0.04)
    out = capsys.readouterr().out
    assert out.startswith("a loop of 1 frame (0.04 s)") and " 1 frame of 1 clip " in out


def test_more_frames_per_second_show_the_same_motion(sample):
    plain, smooth = sample(frames=10), sample(frames=20, fps=50)
    assert np.abs(smooth[::2].astype(int) - plain).max() <= 1
    backwards = sample(frames=10, start=9, speed=-1)
    assert np.abs(backwards[::-1].astype(int) - plain).max() <= 1


def test_every_option_gets_where_it_is_used(tmp_path, monkeypatch):
    """What render, the writer and the kernels are told, and under which autocast; by a checkpoint
    of 10 frames per second.
    """
    asked = {}

    def render(generator, **options):
        asked.update(options)

        def windows():
            asked["bf16"] = torch.is_autocast_enabled("cpu")
            yield torch.zeros(options["clips"], 1, 3, 32, 32, dtype=torch.uint8)

        return windows()

    class Writer(program.VideoWriter):
        def __init__(self, *args):
            asked["writer"] = args
            super().__init__(*args)

    monkeypatch.setattr(program, "render", render)
    monkeypatch.setattr(program, "VideoWriter", Writer)
    monkeypatch.setattr(program, "choose_kernels", lambda *args: asked.update(kernels=args))
    monkeypatch.setattr(program, "has_bf16", lambda device: True)
    save(tmp_path, make(num_labels=2, fps=10.0))
    options = dict(
        crf=9,
        frames=1,
        seed=4,
        motion_seed=7,
        content_seeds=(3, 5),
        content_seconds=2.5,
        psi=0.25,
        condition=(0.5, -1.0),
        motion_style=("2=0.5",),
        start=12.5,
        speed=-0.5,
        fps=20.0,
        grid="2x3",
        rows="motion",
        columns="content",
        precision="bf16",
        kernels="reference",
    )
    out = tmp_path / "a.mp4"
    assert program.sample(program.Options(tmp_path, out, **options))
    path, fps, crf, comment = asked.pop("writer")
    assert (path, fps, crf) == (out, 20, 9) and '"seed": 4' in comment
    device = torch.device("cpu")
    assert asked == {
        "seed": [(3, 5), (5, 3), (3, 5)] * 2,
        "start": 12.5,
        "frames": 1,
        "clips": 6,
        "motion_seed": [7, 7, 7, 8, 8, 8],
        "label": [0.5, -1.0],
        "psi": 0.25,
        "content_frames": 25,  # 2.5 seconds of 10 frames
        "style_gain": {2: 0.5},
        "step": -0.25,  # half the pace, at twice the rate
        "loop": None,
        "bf16": True,
        "kernels": ("reference", False, device),
    }
    program.sample(program.Options(tmp_path, tmp_path / "b.npy", frames=1, label=1, loop=2.0))
    assert asked["label"] == 1 and asked["loop"] == 20 and not asked["bf16"]
    assert asked["seed"] == [0] and asked["motion_seed"] == [0] and asked["psi"] == 1


def test_bf16_on_a_cpu_is_close_and_says_how_close(sample, monkeypatch, capsys):
    """On every processor: without instructions for it PyTorch converts."""
    monkeypatch.setattr(program, "has_bf16", lambda device: True)
    in_float32 = sample(frames=4).astype(float)
    assert "grey" not in capsys.readouterr().out
    difference = np.abs(sample(frames=4, precision="bf16") - in_float32)
    printed = re.search(r"changes the first frame by (\d\.\d\d) of 255", capsys.readouterr().out)
    assert 0 < difference.mean() < 2 and abs(float(printed[1]) - difference[0].mean()) < 0.006


def test_a_processor_without_bf16_refuses_it(sample, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "has_bf16", lambda device: False)
    with pytest.raises(UserError, match="no instructions"):
        sample(precision="bf16")
    assert not list(tmp_path.iterdir())


def test_the_clips_of_a_grid_stand_row_by_row(run, tmp_path, monkeypatch):
    """Two rows of three clips: clip i has the level 40 i, and gets brighter from frame to frame."""

    def render(*args, **options):
        levels = 40 * torch.arange(6)[:, None] + torch.arange(4)
        frames = levels[:, :, None, None, None].expand(-1, -1, 3, 32, 32).to(torch.uint8)
        yield from frames.split(3, dim=1)

    monkeypatch.setattr(program, "render", render)
    options = program.Options(run, tmp_path / "a.npy", frames=4, grid="2x3")
    assert program.sample(options)
    frames = np.load(tmp_path / "a.npy")
    assert frames.shape == (4, 64, 96, 3)
    for r in range(2):
        for c in range(3):
            shown = frames[:, 32 * r : 32 * r + 32, 32 * c : 32 * c + 32]
            expected = 40 * (3 * r + c) + np.arange(4)
            assert (shown == expected[:, None, None, None]).all()


def test_a_video_that_was_interrupted_says_so_by_its_status(run, tmp_path, monkeypatch, capsys):
    def render(generator, frames, **options):
        for made in range(0, frames, 3):
            if made == 3:
                signal.raise_signal(signal.SIGINT)
            yield torch.zeros(1, 3, 3, 32, 32, dtype=torch.uint8)

    monkeypatch.setattr(program, "render", render)
    words = ["sample", "--checkpoint", str(run), "--out", str(tmp_path / "a.npy")]
    monkeypatch.setattr(sys, "argv", [*words, "--frames", "9"])
    assert program.main() == 130 and "the video ends" in capsys.readouterr().err
    assert len(np.load(tmp_path / "a.npy")) == 6
    monkeypatch.setattr(sys, "argv", [*words, "--frames", "3", "--force"])
    assert program.main() is None


@pytest.mark.parametrize("rows", ["content", "motion", "nothing"])
@pytest.mark.parametrize("columns", ["content", "motion", "nothing"])
def test_grids(run, rows, columns):
    """What each clip of a 2 × 3 grid shows: content and motion by its row, its column, or its
    own.
    """
    options = program.Options(run, grid="2x3", rows=rows, columns=columns, seed=10, motion_seed=20)
    content, motion = program.grid_seeds(options, 2, 3)
    place = [(r, c) for r in range(2) for c in range(3)]
    for what, seeds, first in (("content", content, 10), ("motion", motion, 20)):
        assert min(seeds) == first
        for (r, c), seed in zip(place, seeds):
            for (other_r, other_c), other in zip(place, seeds):
                shared = (rows == what and r == other_r) or (columns == what and c == other_c)
                shared = shared or (r, c) == (other_r, other_c) or rows == columns == what
                assert (seed == other) == shared


def test_a_grid_shows_content_and_motion_apart(sample):
    frames = sample(frames=4, grid="2x2", rows="motion", columns="content", seed=5, motion_seed=8)
    assert frames.shape == (4, 64, 64, 3)
    for r in range(2):
        for c in range(2):
            alone = sample(frames=4, seed=5 + c, motion_seed=8 + r)
            assert np.abs(clip(frames, r, c) - alone).max() <= 1
    for other in (clip(frames, 0, 1), clip(frames, 1, 0)):
        assert np.abs(clip(frames, 0, 0) - other).max() > 1


def test_content_moves_and_styles_are_scaled(sample):
    moving = sample(frames=11, content_seeds=(1, 2), content_seconds=0.4, motion_seed=3)
    for at, seed in ((0, 1), (10, 2)):
        assert (
            np.abs(
                moving[at].astype(int) - sample(frames=1, seed=seed, motion_seed=3, start=at)[0]
            ).max()
            <= 1
        )
    plain, without = sample(frames=4), sample(frames=4, motion_style=("0=0", "3=1.5"))
    assert not np.array_equal(plain, without) and np.array_equal(
        sample(frames=4, motion_style=("0=1",)), plain
    )
    assert not np.array_equal(sample(frames=4, psi=0.5), plain)


def test_labels(tmp_path, sample):
    save(tmp_path, make(num_labels=3))
    frames = [sample(checkpoint=tmp_path, frames=2, label=label) for label in (0, 2)]
    assert not np.array_equal(*frames)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"grid": "2"}, "ROWSxCOLUMNS"),
        ({"grid": "0x3"}, "ROWSxCOLUMNS"),
        ({"motion_style": ("1:0",)}, "k=GAIN"),
        ({"motion_style": ("1=x",)}, "k=GAIN"),
        ({"motion_style": ("9=0",)}, "0 to 7"),
        ({"speed": 0.0}, "speed"),
        ({"speed": float("nan")}, "finite"),
        ({"psi": float("inf")}, "psi"),
        ({"fps": 0.0}, "--fps"),
        ({"loop": -1.0}, "--loop"),
        ({"content_seconds": 0.0}, "--content-seconds"),
        ({"frames": 0}, "frames"),
        ({"start": 2e8}, "start"),
        ({"start": float("nan")}, "finite"),
        ({"seed": -1}, "seed"),
        ({"label": 1}, "without labels"),
        ({"crf": 60}, "crf"),
        ({"out": Path("a.avi")}, ".avi"),
        ({"out": Path("a.gif"), "fps": 60.0}, "at most 50"),
        ({"checkpoint": Path("nowhere")}, "neither a checkpoint"),
        ({"fps": 1e8}, "at most 1000 frames per second"),
        ({"loop": 0.5, "speed": 0.0}, "speed"),
        ({"loop": 0.5, "label": 1}, "without labels"),
        ({"out": Path("a.webp"), "grid": "7x512"}, "224 high and 16384 wide"),
        ({"grid": "513x1"}, "at most 16384 pixels"),
    ],
    ids=str,
)
def test_bad_options_are_named_and_leave_nothing(run, tmp_path, monkeypatch, capsys, options, word):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=word) as caught:
        program.sample(program.Options(**{"checkpoint": run, "out": Path("a.mp4")} | options))
    assert (
        "\n" not in str(caught.value)
        and list(tmp_path.iterdir()) == []
        and capsys.readouterr().out == ""
    )


def test_a_picture_too_large_is_said_before_anything_is_rendered(run, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "render", lambda *args, **options: pytest.fail("rendered"))
    with pytest.raises(UserError, match="at most 16384 pixels"):
        program.sample(program.Options(run, tmp_path / "a.mp4", grid="1x513"))


# files


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.npy", "frames"])
def test_every_format_has_the_frames_and_says_how_they_were_made(run, tmp_path, sample, name):
    options = program.Options(
        run, tmp_path / name, frames=17, seed=4, speed=-0.5, motion_style=("1=0",)
    )
    assert program.sample(options)
    frames = frames_in(tmp_path / name)
    assert len(frames) == 17
    made = json.loads(comment_in(tmp_path / name))
    model = (run / "checkpoint-000000" / "model.safetensors").read_bytes()
    assert made["model.safetensors sha256"] == hashlib.sha256(model).hexdigest()
    assert made["checkpoint"] == f"{run.name}/checkpoint-000000" and made["options"]["fps"] == 25
    again = sample(**made["options"])
    assert np.array_equal(again, sample(**made["options"]))
    error = np.abs(np.stack(frames).astype(float) - again).mean()
    # noise-like frames are hard to code.
    assert error < {"a.mp4": 6, "a.gif": 8, "a.webp": 8}.get(name, 1e-9)


def test_force_replaces_and_without_it_the_old_file_stays(run, tmp_path):
    for name in ("a.mp4", "a.npy", "frames"):
        options = program.Options(run, tmp_path / name, frames=5)
        program.sample(options)
        with pytest.raises(UserError, match="--force"):
            program.sample(dataclasses.replace(options, frames=3))
        assert len(frames_in(tmp_path / name)) == 5
        program.sample(dataclasses.replace(options, frames=3, force=True))
        assert len(frames_in(tmp_path / name)) == 3


def test_without_force_a_sidecar_stays(run, tmp_path):
    sidecar = tmp_path / "a.npy.json"
    sidecar.write_text("precious")
    options = program.Options(run, tmp_path / "a.npy", frames=2)
    with pytest.raises(UserError, match=r"a\.npy\.json is there already.*--force"):
        program.sample(options)
    assert sidecar.read_text() == "precious" and list(tmp_path.iterdir()) == [sidecar]
    program.sample(dataclasses.replace(options, force=True))
    assert json.loads(sidecar.read_text())["options"]["frames"] == 2


# the program


def start(run, tmp_path, *args):
    command = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", str(run), *args]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [("a.mp4", signal.SIGINT), ("a.webp", signal.SIGTERM)])
def test_stopped_it_leaves_what_was_rendered(run, tmp_path, name, number):
    program = start(run, tmp_path, "--frames", "1000000", "--out", name)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f".{name}.*.part")):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    program.send_signal(number)
    out, errors = program.communicate(timeout=60)
    assert program.returncode == 130
    assert errors == "interrupted; the video ends with what was rendered\n"
    count = len(frames_in(tmp_path / name))
    assert 0 < count < 1_000_000 and f"{name}: {count} frames" in out
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_an_error_is_one_line(run, tmp_path):
    program = start(run, tmp_path, "--start", "2e8", "--out", "a.mp4")
    out, errors = program.communicate(timeout=120)
    assert program.returncode == 2 and errors.startswith("error: start is 2e+08")
    assert errors.count("\n") == 1
    assert out == "" and list(tmp_path.iterdir()) == []


MEMORY = """
import sys
from pathlib import Path
import sample

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

seen = []
class Writer(sample.VideoWriter):
    def write(self, frames):
        super().write(frames)
        seen.append(resident())
sample.VideoWriter = Writer
sample.sample(sample.Options(Path(sys.argv[1]), Path(sys.argv[2]), frames=20_000, start=1e7))
early = seen[len(seen) // 20]
print("growth", max(seen[len(seen) // 20 :]) - early, early - min(seen[len(seen) // 20 :]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_memory_stays_flat_over_20000_frames(tmp_path):
    small = {"channel_base": 64, "channel_max": 4, "motion_styles": 2, "motion_resolutions": (16,)}
    save(tmp_path, make(**small))
    command = [sys.executable, "-c", MEMORY, tmp_path, tmp_path / "a.mp4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    up, down = (float(x) for x in done.stdout.splitlines()[-1].split()[1:])
    assert up < 30 and down < 30
    assert len(frames_in(tmp_path / "a.mp4")) == 20_000
