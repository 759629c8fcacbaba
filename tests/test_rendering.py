"""render.py: any stretch of a video alone, any pace, loops, moving content, motion styles by
hand.
"""

import itertools
import threading
from fractions import Fraction

import pytest
import torch
from test_model import TINY, frames_of, make

import mostgan
from mostgan import rendering
from mostgan.config import UserError
from mostgan.motion import content_latent
from mostgan.rendering import (
    Shown,
    Way,
    choose_window,
    content_at,
    content_stops,
    exact,
    frame_times,
    loop_step,
    to_uint8,
)


def render(generator, seed=3, **options):
    return torch.cat(list(mostgan.render(generator, seed, **options)), dim=1)


def assert_close(frames, expected):
    """The same numbers up to rounding, which at the edge between two levels of uint8 may show."""
    difference = (frames.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 2e-3


def mean_steps(frames):
    """How much each frame differs from the one before, [n - 1], over all clips and pixels."""
    return (frames[:, 1:].float() - frames[:, :-1].float()).abs().mean(dim=(0, 2, 3, 4))


# any stretch


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": 10_000_000},
        {"start": -20},
        {"start": 0.1, "step": 0.7},
        {"start": 99.5, "step": -0.25},
        {"step": 1000.5},
        {"loop": 21},
        {"loop": 40, "step": -1, "start": 5},
        {"seed": [(1, 2, 3), (2, 3, 1)]},
        {"seed": [(1, 2), (5, 6)], "loop": 30},
        {"window": 4},
        {"label": 1},
    ],
    ids=str,
)
def test_a_stretch_alone_is_the_same_to_the_bit(options):
    """What several machines render in pieces, joined, is what one renders."""
    generator = make(num_labels=2 * ("label" in options))
    options = {"clips": 2, "start": 0, "step": 1} | options
    whole = render(generator, frames=50, **options)
    assert whole.shape == (2, 50, 3, 32, 32) and whole.dtype == torch.uint8
    assert len(torch.unique(whole[0].flatten(1), dim=0)) == min(50, options.get("loop", 50))
    step = exact(options["step"])
    if "loop" in options:
        step, _ = loop_step(TINY, step, options["loop"])
    for first, count in ((0, 1), (1, 20), (17, 16), (21, 29), (49, 1)):
        piece = render(
            generator, frames=count, **options | {"start": exact(options["start"]) + first * step}
        )
        assert torch.equal(piece, whole[:, first : first + count])


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clips": 4, "motion_seed": [1, 1, 2, 2]},
        {"start": 5, "loop": 21},
        {"seed": [(1, 2, 3)], "content_frames": 7},
        {"step": 1000.5},
        {"style_gain": {1: 0.5}},
    ],
    ids=str,
)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("pixels", [1, rendering.PIXELS_AT_ONCE], ids=["one", "several at once"])
def test_threads_and_windows_change_no_bit(options, bf16, pixels, threads, monkeypatch):
    """Large frames are made one by one, small ones together."""
    monkeypatch.setattr(rendering, "PIXELS_AT_ONCE", pixels)
    generator, expected = make(), None
    for count, window in ((1, 16), (1, 1), (2, 1), (2, 4), (2, 16), (4, 4), (4, 64), (4, None)):
        threads(count)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            frames = render(generator, frames=36, window=window, **options)
        expected = frames if expected is None else expected
        assert torch.equal(frames, expected), (count, window)


def test_frames_are_made_in_other_threads_under_the_callers_autocast(threads, monkeypatch):
    generator, seen = make(), []
    forward = generator.synthesis.forward

    met, calls = threading.Barrier(2), itertools.count()

    def watched(*args):
        if next(calls) < 2:  # two are at work at once
            met.wait(60)
        state = torch.get_num_threads(), torch.is_inference_mode_enabled()
        seen.append((threading.current_thread(), *state, torch.is_autocast_enabled("cpu")))
        return forward(*args)

    monkeypatch.setattr(generator.synthesis, "forward", watched)
    threads(3)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = render(generator, frames=320)
    difference = (in_bf16.float() - render(generator, frames=320).float()).abs()
    assert len(seen) == 40  # 16 small frames at once
    assert 0 < difference.mean() < 2
    of_thread, counts, inference, autocast = zip(*seen)
    assert 1 < len(set(of_thread[:20])) <= 3 and threading.main_thread() not in of_thread
    assert set(counts) == {1} and all(inference) and torch.get_num_threads() == 3
    assert all(autocast[:20]) and not any(autocast[20:])


def test_no_more_threads_than_memory_holds(monkeypatch):
    """Of the paper's model a frame of one clip has features of 256² · 64 numbers, four times."""
    monkeypatch.setattr(rendering, "memory_bytes", lambda device: 2 * 81 * 7 * 4 * 4 * 64 * 256**2)
    assert rendering.threads_that_fit(mostgan.ModelConfig(), 81) == 7
    assert rendering.threads_that_fit(mostgan.ModelConfig(), 1000) == 1
    asked, one_core_threads = [], rendering.one_core_threads
    monkeypatch.setattr(
        rendering, "one_core_threads", lambda most: asked.append(most) or one_core_threads(most)
    )
    render(make(), frames=2, clips=2)
    assert asked == [rendering.threads_that_fit(make().config, 2)]


@pytest.mark.parametrize("ending", ["error", "dropped", "whole"])
def test_no_thread_is_left(ending, threads, monkeypatch):
    """After an error in a frame, which its window raises; or if nobody wants the other windows."""
    threads(2)
    generator, before = make(), threading.active_count()
    forward, calls = generator.synthesis.forward, itertools.count()

    def failing(*args):
        if next(calls) == 9 and ending == "error":
            raise RuntimeError("frame 9")
        return forward(*args)

    monkeypatch.setattr(generator.synthesis, "forward", failing)
    windows = mostgan.render(generator, 0, frames=1600, window=4)
    if ending == "error":
        with pytest.raises(RuntimeError, match="frame 9"):
            list(windows)
    elif ending == "dropped":
        assert next(windows).shape[1] == 4
        windows.close()
        assert next(calls) < 40
    else:
        assert sum(window.shape[1] for window in windows) == 1600
    assert threading.active_count() == before and torch.get_num_threads() == 2


@torch.no_grad()
@pytest.mark.parametrize("t", [0.0, 1e7, -1e7, 1e8 - 8])
def test_far_frames_match_float64(t):
    generator = make()
    times = t + torch.arange(4, dtype=torch.float64)[None] * 1.25
    near = frames_of(generator, [5], times - t)
    single = frames_of(generator, [5], times)
    double = frames_of(generator.double(), [5], times)
    assert (single - double).norm() / double.norm() < 1e-4
    moved, moved_near = ((x[1:] - x[:-1]).norm() for x in (double, near))
    assert 0.2 < moved / moved_near < 5  # as much as near 0: phases that were rounded would jump


def test_times_are_decimals_rounded_once():
    start, step = exact(0.1), exact(0.7)
    assert (start, step) == (Fraction(1, 10), Fraction(7, 10)) and exact(
        Fraction(1, 3)
    ) == Fraction(1, 3)
    way = Way(start, step, first=17, loop=None, anchors=None, period=None)
    # 0.1 + 17 · 0.7 in floats is 11.999…
    assert frame_times(way, 17, 3).tolist() == [12.0, 12.7, 13.4]
    circle = Way(exact(1e7), -step, first=0, loop=7, anchors=2, period=32)
    assert frame_times(circle, 0, 2).tolist() == [0.0, 31.3]


def test_windows_are_powers_of_two_that_fit():
    device = torch.device("cpu")
    assert [choose_window(TINY, clips, device) for clips in (1, 2, 3, 9, 100)] == [16, 8, 4, 4, 4]


def test_a_gpus_windows_follow_its_memory(monkeypatch):
    import mostgan.rendering as module

    monkeypatch.setattr(module, "memory_bytes", lambda device: 2**30)
    windows = [choose_window(TINY, clips, torch.device("cuda")) for clips in (1, 4, 100, 10**6)]
    assert windows[0] == 64 and windows == sorted(windows, reverse=True) and windows[-1] == 1
    assert all(window & (window - 1) == 0 for window in windows)


def test_bad_arguments_are_said_before_the_first_window():
    generator = make()
    for bad in ({"step": 0, "loop": 5}, {"label": 1}, {"style_gain": {9: 1.0}}, {"seed": [1, 2]}):
        with pytest.raises(UserError):
            mostgan.render(generator, **{"seed": 0} | bad)


# pace


def test_pace():
    generator = make()
    plain = render(generator, frames=33, start=8)
    slow = render(generator, frames=65, start=8, step=0.5)
    assert_close(slow[:, ::2], plain)
    assert (mean_steps(slow) > 0).all() and mean_steps(slow).mean() < 0.75 * mean_steps(
        plain
    ).mean()
    assert_close(render(generator, frames=11, start=8, step=3), plain[:, ::3][:, :11])
    assert_close(render(generator, frames=33, start=40, step=-1), plain.flip(1))


def test_time_runs_through_zero_without_a_seam():
    """Frame 0 is like any other: time has no beginning."""
    steps = mean_steps(render(make(), start=-40, frames=80, clips=4))
    assert steps[39:41].max() <= steps.max() and steps.min() > 0


# loops


@pytest.mark.parametrize(
    "loop, options",
    [
        (16, {}),
        (37, {}),
        (48, {"step": -0.5}),
        (5, {"start": 3}),
        (20, {"start": 1e7}),
        (33, {"start": -7.5, "step": 2}),
        (40, {"seed": [(1, 2, 3)] * 2}),
        (12, {"motion_styles": 0}),
        (12, {"label": 1}),
    ],
    ids=str,
)
def test_a_loop_repeats_to_the_bit_and_has_no_seam(loop, options):
    generator = make(
        num_labels=2 * ("label" in options), motion_styles=options.pop("motion_styles", 8)
    )
    frames = render(generator, frames=2 * loop + 3, clips=2, loop=loop, **options)
    assert torch.equal(frames[:, loop:], frames[:, : loop + 3])
    # From the last frame to the first is a step like the others: compare with its neighbours' on
    # either side.
    steps = mean_steps(frames)
    near = [steps[i] for i in (loop - 3, loop - 2, loop, loop + 1)]
    assert steps[loop - 1] <= 1.5 * max(near)


def test_a_loop_is_a_path_of_whole_anchors():
    """Every frame of a loop has a motion code at a time within it; paces are chosen as near as can
    be.
    """
    D = TINY.motion_distance  # 16
    for loop, step, anchors in (
        (16, 1, 1),
        (5, 1, 1),
        (24, 1, 2),
        (100, 1, 6),
        (100, -0.25, 2),
        (7, 10, 4),
    ):
        pace, count = loop_step(TINY, exact(step), loop)
        assert count == anchors and pace * loop == anchors * D * (1 if step > 0 else -1)
    generator = make()
    # Up to half way through a long loop's anchors, noise rows are those of the endless video: so
    # are the frames.
    long = render(generator, frames=16, loop=16 * 64)
    assert_close(long, render(generator, frames=16))


def test_the_seam_would_show_without_periodic_noise(monkeypatch):
    import mostgan.rendering as module

    noise = module.motion_noise
    monkeypatch.setattr(
        module, "motion_noise", lambda seeds, t, config, loop: noise(seeds, t, config)
    )
    steps = mean_steps(render(make(), frames=66, clips=2, loop=64))
    assert steps[63] > 2 * steps[:63].max()


# content and motion


def test_content_and_motion_seeds_are_apart():
    generator = make()
    both = render(generator, [1, 1, 2, 2], clips=4, frames=8, motion_seed=[5, 6, 5, 6])
    for i, (content, motion) in enumerate([(1, 5), (1, 6), (2, 5), (2, 6)]):
        assert_close(both[i : i + 1], render(generator, content, frames=8, motion_seed=motion))
    assert not torch.equal(both[0], both[1]) and not torch.equal(both[0], both[2])


LABELS = {
    "classes": ([2, 0, 1], torch.eye(3)[[2, 0, 1]]),
    "vectors": (torch.arange(9.0).view(3, 3) / 4, torch.arange(9.0).view(3, 3) / 4),
    "one class": (1, torch.eye(3)[[1, 1, 1]]),
}


@pytest.mark.parametrize("name", LABELS)
def test_every_clip_has_its_own_label(name):
    """Against the forward pass, in content and in motion; and where content moves."""
    (label, condition), generator = LABELS[name], make(num_labels=3)
    with torch.no_grad():
        generator.motion_codes.conv0[:, -3:] *= 30  # motion hears of its label, too
        generator.mapping.w_avg.normal_(generator=torch.Generator().manual_seed(1))
    t = torch.arange(2, dtype=torch.float64).expand(3, -1)
    made = frames_of(generator, [4, 5, 6], t, condition, psi=0.6)
    options = dict(frames=2, clips=3, label=label, psi=0.6)
    assert_close(render(generator, 4, **options), to_uint8(made).unflatten(0, (3, 2)))
    other = frames_of(generator, [4, 5, 6], t, condition.roll(1, dims=1), psi=0.6)
    assert (made - other).abs().mean() > 0.02
    moving = render(generator, [(4, 9), (5, 9), (6, 9)], content_frames=1, **options)
    first, second = to_uint8(made).unflatten(0, (3, 2))[:, :1], moving[:, 1:]
    assert_close(moving[:, :1], first)
    for i in range(3):
        of_nine = {"label": condition[i : i + 1], "psi": 0.6, "motion_seed": 4 + i}
        assert_close(second[i : i + 1], render(generator, 9, start=1, frames=1, **of_nine))


def test_every_class_is_truncated_to_its_own_mean():
    """Of an imported model; what is no class goes to the mean of all (spec §3)."""
    generator = make(num_labels=3)
    means = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    generator.mapping.class_means = means
    generator.mapping.w_avg.normal_(generator=torch.Generator().manual_seed(1))
    condition = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 0.5, 0.5]])
    expected = torch.stack([means[2], means[0], generator.mapping.w_avg])
    shown = Shown([(1,), (2,), (3,)], [1, 2, 3], condition, 0.0, 1.0, None)
    assert torch.allclose(content_stops(generator, shown)[:, 0], expected)
    z = content_latent([1, 2, 3], 32)
    nearer = content_stops(generator, shown._replace(psi=0.75))[:, 0]
    w = generator.mapping(z, condition)
    assert torch.allclose(nearer, expected + 0.75 * (w - expected), atol=1e-6)


def test_one_motion_seed_is_every_clips():
    generator = make()
    clips = render(generator, [1, 1, 2], clips=3, frames=2, motion_seed=5)
    assert torch.equal(clips[0], clips[1])
    assert_close(clips[2:], render(generator, 2, frames=2, motion_seed=5))


def test_levels_are_the_nearest():
    """Spec §0: −1 is level 0, 0 is 128, 1 is 255; what is beyond is cut off."""
    level = torch.arange(256.0)
    for off in (-0.49, 0.0, 0.49):
        assert torch.equal(to_uint8((level + off - 127.5) / 127.5), level.to(torch.uint8))
    outside = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])
    assert to_uint8(outside).tolist() == [0, 0, 128, 255, 255]


def test_psi_0_is_the_mean_content():
    generator = make()
    generator.mapping.w_avg.normal_(generator=torch.Generator().manual_seed(0))
    alike = render(generator, 0, clips=2, frames=4, motion_seed=1, psi=0)
    assert_close(alike[0], alike[1])
    assert not torch.equal(render(generator, 0, frames=4, motion_seed=1), alike[:1])


@pytest.mark.parametrize(
    "changes", [{}, {"num_labels": 2}, {"motion_styles": 0}, {"modulation_order": "motion_first"}]
)
def test_content_moves_through_its_seeds(changes):
    """At its stops the content is the seed's; between them it moves in steps that are small; and
    round again.
    """
    generator = make(**changes)
    label = {"label": 1} if "num_labels" in changes else {}
    moving = render(generator, [(7, 8, 9)], frames=40, content_frames=12, motion_seed=5, **label)
    for k, seed in enumerate((7, 8, 9, 7)):
        still = render(generator, seed, start=12 * k, frames=2, motion_seed=5, **label)
        assert_close(moving[:, 12 * k : 12 * k + 1], still[:, :1])
        assert not torch.equal(moving[:, 12 * k + 1 : 12 * k + 2], still[:, 1:])
    jump = mean_steps(
        torch.cat([render(generator, s, frames=1, motion_seed=5, **label) for s in (7, 8)], dim=1)
    )
    assert mean_steps(moving).max() < jump


def test_the_way_of_the_content_is_smooth():
    shown = Shown([(1, 2, 3, 4)], [1], None, 1.0, 1.0, None)
    stops = content_stops(make().double(), shown)
    u = torch.linspace(-1, 5, 6001, dtype=torch.float64)[None]
    w = content_at(stops, u)
    velocity = (w[:, 1:] - w[:, :-1]) * 1000
    assert (
        velocity[:, 1:] - velocity[:, :-1]
    ).abs().max() < 0.03 * velocity.abs().max()  # no kink at a stop
    assert torch.allclose(content_at(stops, u[:, :1] + 4), w[:, :1])


# motion styles by hand


def test_style_gains():
    generator = make()
    plain = render(generator, frames=6)
    assert torch.equal(render(generator, frames=6, style_gain={2: 1.0}), plain)
    without = render(generator, frames=6, style_gain={2: 0.0})
    assert not torch.equal(without, plain)
    half = render(generator, frames=6, style_gain={2: 0.5})
    assert 0 < (half.float() - plain.float()).norm() < (without.float() - plain.float()).norm()
    # Without any style, a layer's weight is its content's: the motion of StyleGAN-V remains.
    bare = make(motion_styles=0)
    bare.load_state_dict(
        {k: v for k, v in generator.state_dict().items() if k in bare.state_dict()}
    )
    assert_close(
        render(generator, frames=6, style_gain={k: 0.0 for k in range(8)}), render(bare, frames=6)
    )
    with pytest.raises(UserError, match="has none"):
        render(bare, style_gain={0: 0.5})
