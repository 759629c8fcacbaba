"""The paper's figures 5 to 8 in numbers (spec §14), noted while a generator works.

drawing.py makes pictures of them, with words, page.py a page, and `python -m mostgan.figures`
(__main__.py) all of it. Shapes: T frames, K motion styles, O output channels (filters).
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import kernels
from mostgan.motion import condition_at, content_latent, motion_noise
from mostgan.rendering import conditions, frame_conditions, to_uint8


class Seen(NamedTuple):
    """What MoStAtt did in one layer while a clip was made."""

    block: int  # its resolution
    conv: str
    attention: torch.Tensor  # A of Eq. 2, [T, O, K]
    cosines: torch.Tensor  # of `style_cosines`, [T, K, K]
    maps: torch.Tensor  # of `style_maps`, [T, K, H, W]


@torch.inference_mode()
def watch(generator, seed, frames, step=1, label=None, frame_condition=None):
    """Makes a clip, a frame at a time. Returns its frames, uint8 [T, 3, H, W], and a Seen of every
    layer with motion styles. step: time between frames; label, frame_condition: as of `render`.
    """
    config, device, noted, hooks = generator.config, generator.mapping.w_avg.device, {}, []
    for block, (convs, _) in zip(config.resolutions, generator.synthesis.layers()):
        for name, layer in zip(("conv1", "conv0"), reversed(convs)):
            if layer.hypernetwork is not None:
                noted[block, name] = []
                hooks.append(layer.register_forward_hook(partial(_note, noted[block, name])))
    z, label = content_latent([seed], config.z_dim), conditions(config, label, 1, device)
    rows, clip, e = frame_conditions(config, frame_condition, 1), [], None
    try:
        for i in range(frames):
            t = torch.tensor([[float(i * step)]], dtype=torch.float64)
            noise, first_anchor = motion_noise([seed], t, config)
            if rows is not None:
                e = torch.from_numpy(condition_at(rows[0], t[0])[None]).to(device)
            moment = (x.to(device) for x in (z, t, noise, first_anchor))
            clip.append(to_uint8(generator(*moment, label, frame_condition=e)).cpu())
    finally:
        for hook in hooks:
            hook.remove()
    seen = [Seen(*name, *map(torch.cat, zip(*calls))) for name, calls in sorted(noted.items())]
    return torch.cat(clip), seen


def _note(calls, layer, inputs, outputs):
    """A hook: adds to a list what a call of a layer did."""
    (_, _, motion_vectors), (features, score) = inputs, outputs
    attention = score.float().softmax(dim=2)
    motion_style = layer.hypernetwork(motion_vectors).unflatten(2, (layer.rank, -1))
    cosines = style_cosines(motion_style, layer.in_channels)
    calls.append((attention.cpu(), cosines.cpu(), style_maps(attention, features.float()).cpu()))


def style_cosines(motion_style, in_channels):
    """Cosines between the modulations M (Eq. 1) of two styles, as vectors of I·k·k numbers (figure
    5). motion_style: [N, K, R, I + k + k] → [N, K, K].
    """
    M = F.normalize(kernels.motion_modulation(motion_style, in_channels, 3), dim=2)
    return M @ M.transpose(1, 2)


def style_maps(attention, features):
    """Where each style acts (figure 7): Σ_o A[o,κ] |x[o,y,x]| / Σ_o |x[o,y,x]|.

    attention: [N, O, K], features x: [N, O, H, W] → [N, K, H, W]; over the styles they sum to 1.
    """
    size = features.abs()
    total = size.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.einsum("nok,noyx->nkyx", attention, size) / total


def relative_maps(maps):
    """Maps less their mean over the styles, each style's over its largest value in the clip, and
    these values, [K]; a style that is nowhere above the mean stays below 0. maps: [T, K, H, W].
    """
    relative = maps - maps.mean(dim=1, keepdim=True)
    largest = relative.amax(dim=(0, 2, 3))
    return relative / largest.abs().clamp(min=1e-12)[:, None, None], largest


def correlations(clips):
    """How alike clips of figure 8 are: mean correlations [2, 2] of the looks (the mean over time)
    of two that share their content, or nothing, and of the changes (the rest) of two that share
    their motion, or nothing; less means over all clips, uint8 [motions, contents, T, 3, H, W].
    """
    motion, content = np.indices(clips.shape[:2]).reshape(2, -1)
    same = np.stack([content[:, None] == content, motion[:, None] == motion])
    grey = clips.float().mean(dim=3).flatten(0, 1)  # [clips, T, H, W]
    looks, means = grey.mean(dim=1, keepdim=True), []
    for x, pairs in ((looks, same[0] & ~same[1]), (grey - looks, same[1] & ~same[0])):
        unit = F.normalize((x - x.mean(dim=0)).flatten(1), dim=1)
        alike = (unit @ unit.t()).numpy()
        means.append([alike[pairs].mean(), alike[~same.any(axis=0)].mean()])
    return np.array(means)


def curves(stats):
    """Of `read_stats` → {name: [2, n], thousands of frames and values, NaN if not finite}."""
    columns = {}
    for line in stats:
        numbers = (name for name in line if isinstance(line[name], int | float | None))
        for name in numbers:
            columns.setdefault(name, []).append((line["frames"] / 1000, line[name]))
    return {name: np.array(points, float).T for name, points in columns.items()}
