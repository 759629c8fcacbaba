"""sky.py: the built-in sky is deterministic, moves gently, and its clips differ."""

import numpy as np
import pytest

from mostgan.prepare import sky
from mostgan.prepare.reading import Settings


def luma(clip):
    return clip.astype(float).mean(1)


@pytest.mark.parametrize("resolution", [32, 64])
def test_clips_are_deterministic_and_have_the_right_form(resolution):
    clip = sky.make_clip(3, resolution, frames=11)
    assert clip.shape == (11, 3, resolution, resolution) and clip.dtype == np.uint8
    assert (sky.make_clip(3, resolution, frames=11) == clip).all()
    assert (sky.make_clip(3, resolution, frames=20)[:11] == clip).all()
    frames = sky.SkyClip(3, 11).frames(Settings(resolution, "raw"), 0, None, {}, set())
    assert (np.stack([shown.image for _, shown in frames]) == clip.transpose(0, 2, 3, 1)).all()


def test_seeds_and_indices_differ():
    one = sky.make_clip(0, 32, 3)
    assert np.abs(one.astype(int) - sky.make_clip(0, 32, 3, seed=1)).mean() > 5
    assert len({clip.name for clip in sky.clips()}) == sky.CLIPS >= 24
    firsts = np.stack([sky.make_clip(index, 32, 1)[0] for index in range(sky.CLIPS)]).astype(float)
    distance = np.abs(firsts[:, None] - firsts[None]).mean((2, 3, 4)) + 99 * np.eye(len(firsts))
    assert distance.min() > 5


def test_clouds_move_a_little_every_frame():
    for index in range(8):
        clip = sky.make_clip(index, 64).astype(float)
        step = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
        assert (step > 0.3).all() and (step < 12).all(), index
        # It goes somewhere, it does not jitter.
        assert np.abs(clip[32] - clip[0]).mean() > 2 * step.mean(), index


def test_clouds_are_carried_by_the_wind():
    """Near the top of the picture, the best horizontal shift from one frame to the fourth after it
    follows the wind of the low deck; in one of these skies the high deck hides it.
    """
    follow = 0
    for index in range(8):
        wind = sky._draw_scene(index, 0)["low deck"]["wind"][0] * 64 * 4
        top = luma(sky.make_clip(index, 64, 5))[:, :6]
        errors = [
            np.abs(top[4][:, 10 + s : 54 + s] - top[0][:, 10:54]).mean() for s in range(-10, 11)
        ]
        follow += np.sign(np.argmin(errors) - 10) == np.sign(wind)
    assert follow >= 7


def test_sky_is_brighter_than_the_ground_and_light_changes():
    for index in range(7):
        clip = luma(sky.make_clip(index, 64))
        assert clip[:, 20:40].mean() > clip[:, -2:].mean() + 20
        assert np.abs(clip[0].mean() - clip[-1].mean()) > 0.2


def test_a_clip_looks_the_same_at_any_resolution():
    small, large = sky.make_clip(1, 32, 2).astype(float), sky.make_clip(1, 64, 2).astype(float)
    assert np.abs(large.reshape(2, 3, 32, 2, 32, 2).mean((3, 5)) - small).mean() < 8
