"""The built-in procedural sky: time-lapse skies made from nothing, so that training runs before any
data is downloaded.

A clip is a pure function of (seed, index) and looks the same at every resolution: a graded sky, two
decks of clouds carried by the wind across a plane overhead, a sun that lights and colours them,
light that changes with time, and dark ridges below.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from mostgan.prepare.frames import Shown, Timing

VERSION = 2  # raise it when the pictures change, so that cached ones are made again
CLIPS, FRAMES, FPS = 64, 64, 25.0
NOISE_SIZE = 256  # texels a side of the periodic noise; its features are about 16 texels wide

# Per mood: colours of (zenith, horizon, lit cloud, shaded cloud, glow around the sun), sRGB 0…1.
# fmt: off
MOODS = np.array([
    # blue noon
    [[.10, .27, .62], [.58, .76, .91], [1.00, 1.00, .99], [.60, .66, .75], [.35, .32, .22]],
    # hazy morning
    [[.16, .40, .72], [.78, .87, .92], [1.00, .98, .94], [.66, .71, .78], [.30, .26, .16]],
    # orange sunset
    [[.21, .27, .48], [.97, .62, .32], [1.00, .74, .48], [.40, .30, .38], [.60, .34, .08]],
    # pink dusk
    [[.17, .14, .36], [.86, .44, .46], [.98, .58, .52], [.29, .21, .36], [.50, .20, .12]],
    # violet twilight
    [[.06, .08, .22], [.36, .32, .52], [.48, .43, .62], [.12, .12, .24], [.25, .16, .20]],
    # overcast
    [[.47, .53, .60], [.72, .75, .78], [.88, .89, .90], [.38, .42, .48], [.16, .15, .12]],
    # golden hour
    [[.30, .42, .55], [.93, .82, .60], [1.00, .90, .70], [.48, .46, .50], [.50, .38, .16]],
])
# fmt: on
AFTER = [1, 0, 3, 4, 3, 0, 2]  # the mood that each one drifts towards


@dataclass
class SkyClip:
    """One clip, in the form of a Source (see sources.py)."""

    index: int
    count: int = FRAMES
    seed: int = 0
    label: int | None = None
    problem: str | None = None
    timing: Timing = Timing(FPS, 0.0, None)
    files: tuple = ("procedural sky",)
    facts: frozenset = frozenset()

    @property
    def name(self):
        return f"sky{self.index:03d}"

    def stamp(self, times=True):
        return ["sky", VERSION, self.seed, self.index, self.count]

    def look(self, settings):
        pass

    def fps(self, settings):
        return FPS

    def length(self, settings):
        return self.count

    def frames(self, settings, first, count, errors, facts):
        """Yields (number, Shown) with images uint8 [R, R, 3]."""
        number = 0
        for chunk in _chunks(self.index, settings.resolution, self.count, self.seed):
            for image in chunk.transpose(0, 2, 3, 1):
                yield number, Shown(number / FPS, 1 / FPS, image)
                number += 1

    def framing(self, settings, facts):
        return lambda image: image


def clips(count=CLIPS, length=FRAMES, seed=0):
    """The built-in data set: `count` distinct skies of `length` frames."""
    return [SkyClip(index, length, seed) for index in range(count)]


def make_clip(index, resolution, frames=FRAMES, seed=0):
    """Clip number `index` → uint8 [frames,3,resolution,resolution] (numpy)."""
    return np.concatenate(list(_chunks(index, resolution, frames, seed)))


def _chunks(index, resolution, frames, seed):
    scene = _draw_scene(index, seed)
    # Few at a time: they stay in the cache, and memory stays small at any size.
    for start in range(0, frames, 8):
        t = torch.arange(start, min(start + 8, frames), dtype=torch.float32)
        # One thread: on a busy machine, several wait for each other at every small operation.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            chunk = _render(scene, t[:, None, None], resolution)
        finally:
            torch.set_num_threads(threads)
        yield chunk


def _draw_scene(index, seed):
    """Everything random about a clip, drawn in a fixed order: the resolution changes no draw."""
    rng = np.random.default_rng([seed, index])
    mood = index % len(MOODS)  # in turn, so that a few clips show them all
    horizon = rng.uniform(0.10, 0.30)  # height of the ground
    return {
        "seed": seed,
        "mood": mood,
        "drift": rng.uniform(0.1, 0.6),  # how far the mood moves towards the next within 64 frames
        "light": rng.uniform(-0.12, 0.12, 2),  # exposure: slope and waviness
        "horizon": horizon,
        "sun": (rng.uniform(0.1, 0.9), horizon + rng.uniform(0.05, 0.35)),
        "low deck": _draw_deck(rng, overcast=mood == 5, speed=(0.5, 1.5)),
        "high deck": _draw_deck(rng, overcast=False, speed=(0.25, 0.7)),
        "far ridge": rng.uniform(-1, 1, (2, 6)),
        "near ridge": rng.uniform(-1, 1, (2, 6)),
    }


def _render(scene, t, resolution):
    """The frames at times t [T,1,1] → uint8 [T,3,R,R] (numpy), painted from far to near."""
    centers = (torch.arange(resolution, dtype=torch.float32) + 0.5) / resolution
    x, y = centers[None, None, :], 1 - centers[None, :, None]  # y points up
    horizon, sun = scene["horizon"], scene["sun"]
    zenith, low, lit, shade, glow = _palette(scene["mood"], scene["drift"], t)
    height = ((y - horizon) / (1 - horizon)).clamp(min=0)

    image = low + (zenith - low) * ((1 - (-2.2 * height).exp()) / (1 - math.exp(-2.2)))[:, None]
    near_sun = (-(((x - sun[0]) ** 2 + (y - sun[1]) ** 2) / 0.10)).exp()[:, None]
    image = image + glow * near_sun
    haze = 0.9 * (-3.2 * height).exp()[:, None]  # far clouds take the colour of the air before them
    for deck, strength in ((scene["high deck"], 0.55), (scene["low deck"], 0.95)):
        density, lighting = _clouds(
            scene["seed"], deck, x - 0.5, height, t, sun[0] - 0.5, resolution
        )
        color = (
            shade
            + (lit - shade) * lighting[:, None]
            + 0.5 * glow * near_sun * (1 - 0.6 * density[:, None])
        )
        color = color + (low - color) * haze
        image = image + (color - image) * (strength * density[:, None])
    exposure = (
        1 + scene["light"][0] * (t / 63 - 0.5) + 0.5 * scene["light"][1] * torch.sin(t / 63 * 5)
    )
    image = image * exposure[:, None]
    for ridge, level, air in ((scene["far ridge"], 0.95, 0.6), (scene["near ridge"], 0.6, 0.12)):
        top = level * horizon + 0.22 * horizon * _ridge(ridge, x)
        # The covered part of each pixel: no jagged edge.
        cover = ((top - y) * resolution + 0.5).clamp(0, 1)[:, None]
        ground = (0.35 * shade * exposure[:, None] + 0.45 * air * low) * (0.25 + 0.75 * air)
        image = image + (ground - image) * cover
    return (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _palette(mood, drift, t):
    """Five colours [T,3,1,1] each, moving from one mood towards another."""
    a, b = (torch.tensor(MOODS[m], dtype=torch.float32) for m in (mood, AFTER[mood]))
    amount = drift * t[..., None] / 63
    return [a[i].view(1, 3, 1, 1) + (b[i] - a[i]).view(1, 3, 1, 1) * amount for i in range(5)]


def _draw_deck(rng, overcast, speed):
    """Draws one deck of clouds: its octaves' places and turns, the wind, how much of the sky it
    covers, how softly.
    """
    # Mostly sideways, slightly towards or away.
    angle = rng.uniform(-0.6, 0.6) + (math.pi if rng.random() < 0.5 else 0)
    speed = rng.uniform(*speed) / 64  # of the picture's width per frame, at the top of the picture
    return {
        "origin": rng.uniform(0, 1, (5, 2)),
        "turn": rng.uniform(0, 2 * math.pi, 5),
        "wind": (speed * math.cos(angle), speed * math.sin(angle)),
        "slip": rng.uniform(
            -0.25, 0.25, (5, 2)
        ),  # octaves drift apart by this part of the wind: clouds change shape
        "coverage": rng.uniform(0.75, 0.95) if overcast else rng.uniform(0.28, 0.58),
        "scale": rng.uniform(0.8, 1.3),
        "softness": rng.uniform(1.1, 2.0),
    }


def _clouds(seed, deck, x, height, t, sun_x, resolution):
    """One deck's density and lighting, each [T,H,W] in 0…1. x from −½ to ½; height above the
    horizon, 0…1.
    """
    # Perspective: the deck is a plane overhead; its distance is 1 at the top of the picture and
    # grows to the horizon.
    distance = 1.35 / (height + 0.35)
    px, pz = x * distance, 1.1 * distance  # [1,H,W] in picture widths
    # The footprint of a pixel, for fading octaves that it cannot show.
    pixel = distance * distance / resolution
    step = 0.06 / math.hypot(sun_x, 0.8)  # towards the sun
    field = _fractal(seed, deck, px, pz, t, pixel)
    ahead = _fractal(seed, deck, px + step * sun_x, pz + step * 0.8, t, pixel, octaves=3)
    threshold, width = 1.1 * (1 - 2 * deck["coverage"]), 0.9 * deck["softness"]
    density = ((field - threshold) / width + 0.5).clamp(0, 1)
    density = density * density * (3 - 2 * density)
    thickness = ((ahead - threshold) / width).clamp(-1, 2)  # cloud between this one and the sun
    return density, (0.85 - 0.40 * thickness + 0.12 * field).clamp(0, 1)


def _fractal(seed, deck, px, pz, t, pixel, octaves=5):
    """Sum of noise octaves at plane points (px, pz) at times t → [T,H,W], about unit variance."""
    total = 0
    for octave in range(octaves):
        wavelength = 1.3 * deck["scale"] / 2.1**octave  # picture widths
        amplitude = (2 * (wavelength / (2.5 * pixel)) - 1).clamp(0, 1) * 0.95 * 0.42**octave
        wind_x, wind_z = (w * (1 + s) for w, s in zip(deck["wind"], deck["slip"][octave]))
        ux, uz = (px - wind_x * t) / wavelength, (pz - wind_z * t) / wavelength
        c, s = math.cos(deck["turn"][octave]), math.sin(deck["turn"][octave])
        texture_period = NOISE_SIZE / 16  # wavelengths per texture
        u = (c * ux - s * uz) / texture_period + deck["origin"][octave][0]
        v = (s * ux + c * uz) / texture_period + deck["origin"][octave][1]
        total = total + amplitude * _sample(_noise(seed), u, v)
    return total


def _ridge(bumps, x):
    """The outline of a ridge at x, around 0: six waves of falling size."""
    return sum(
        torch.sin(x * (3.1 * 1.9**k) + 9 * bumps[1, k]) * (bumps[0, k] / 1.75**k)
        for k in range(bumps.shape[1])
    )


@lru_cache(maxsize=2)
def _noise(seed):
    """A periodic random field [1,1,N+1,N+1] of unit variance, with one band of wavelengths around
    16 texels; the last row and column repeat the first, so that sampling wraps.
    """
    white = np.random.default_rng([seed, 1 << 31]).standard_normal((NOISE_SIZE, NOISE_SIZE))
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIZE)[:, None], np.fft.fftfreq(NOISE_SIZE)[None, :])
    band = np.exp(-(((frequency * 16 - 1) / 0.45) ** 2))
    field = np.fft.ifft2(np.fft.fft2(white) * band).real
    field = np.pad(field / field.std(), ((0, 1), (0, 1)), mode="wrap")
    return torch.tensor(field, dtype=torch.float32)[None, None]


def _sample(noise, u, v):
    """Bilinear samples of the periodic field at (u, v) in periods, [T,H,W] each."""
    where = torch.stack(torch.broadcast_tensors(u, v), -1)
    where = (where - where.floor()) * 2 - 1
    return F.grid_sample(
        noise, where.reshape(1, 1, -1, 2), mode="bilinear", align_corners=True
    ).view(where.shape[:-1])
