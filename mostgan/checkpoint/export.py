"""A generator as a program of plain PyTorch operations, by torch.export: runs where this package is
not installed.

program = torch.export.load("sky.pt2").module()
frames = program(z, t, noise, first_anchor, psi)  # uint8 [B, T, 3, H, W]
"""

import dataclasses
import json
import warnings

import torch
from torch import nn

from mostgan.config import UserError
from mostgan.files import whole_file
from mostgan.model import Generator
from mostgan.motion import FRAME_ANCHORS, motion_noise
from mostgan.rendering import to_uint8

USAGE = """\
torch.export.load(FILE).module()(z, t, noise, first_anchor, psi) -> frames

z             float32 [{clips}, {z_dim}]: content latents, normal numbers, one per clip
t             float64 [{clips}, T]: times in frames, any real numbers >= 0; T is any number, 1 too
noise         float32 [{clips}, J, {motion_noise_dim}]: normal numbers, a row per anchor.
              Anchor j lies at time {motion_distance} j; needed are, for every t, the anchors
              a to a + 21, where a = floor(t / {motion_distance}).
              A video goes on from call to call where each anchor keeps its row
first_anchor  int64 [{clips}]: the anchor that the first row of noise belongs to
psi           float32 []: truncation, 1 none, towards 0 more typical and less diverse
{label}frames        uint8 [{clips}, T, 3, {resolution}, {resolution}], RGB
"""
LABEL_USAGE = """\
label         float32 [{clips}, {num_labels}], a sixth argument: condition vector (a class: one-hot)
"""


class WindowRenderer(nn.Module):
    """A window of frames, all of `Generator.render` but the drawing of numbers. Shapes: USAGE."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, z, t, noise, first_anchor, psi, label=None):
        G = self.generator
        w = torch.lerp(G.mapping.w_avg, G.mapping(z, label), psi)
        frames, _ = G.synthesis(G.synthesis.content(w), *G.motion(w, t, noise, first_anchor, label))
        return to_uint8(frames).unflatten(0, t.shape).contiguous()


def export_window(generator: Generator, clips=1) -> torch.export.ExportedProgram:
    """The generator's window renderer for so many clips at a time and any number of frames; inputs
    as USAGE has them.

    The generator must be on the CPU, whose ops are the plain ones of kernels/reference.py.
    """
    config = generator.config
    t = torch.arange(4, dtype=torch.float64).expand(clips, -1) * config.motion_distance
    noise, first_anchor = motion_noise(range(clips), t, config)
    inputs = [
        torch.zeros(clips, config.z_dim),
        t.contiguous(),
        noise,
        first_anchor,
        torch.tensor(1.0),
    ]
    frames = torch.export.Dim("frames", min=1, max=2**16)  # more fit in no memory
    anchors = torch.export.Dim("anchors", min=FRAME_ANCHORS)
    open_shapes = [{}, {1: frames}, {1: anchors}, {}, {}]
    if config.num_labels:
        inputs.append(torch.eye(config.num_labels)[[0] * clips])
        open_shapes.append({})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about its own insides
        program = torch.export.export(
            WindowRenderer(generator), tuple(inputs), dynamic_shapes=tuple(open_shapes)
        )
        # Nothing of autograd or autocast remains: only ATen's own operations.
        return program.run_decompositions({})


def export_file(generator, path, clips=1):
    """Write the exported renderer, with config.json and usage.txt inside. Whole or not at all.
    Returns the usage.
    """
    if path.suffix != ".pt2":
        raise UserError(f"{path} must end in .pt2, as PyTorch wants it of exported programs")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder")
    if path.exists():
        raise UserError(f"{path} is there already: choose another name")
    if generator.config.frame_condition_dim:
        raise UserError(
            "a model with frame conditions cannot be exported: sample it with sample.py"
        )
    if clips < 1:
        raise UserError(f"--clips is {clips}, but must be at least 1")
    program, values = export_window(generator, clips), dataclasses.asdict(generator.config)
    label = LABEL_USAGE.format(**values, clips=clips) if values["num_labels"] else ""
    usage = USAGE.format(**values, clips=clips, label=label)
    inside = {"config.json": json.dumps(values, indent=2), "usage.txt": usage}
    with whole_file(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.export.save(program, file, extra_files=inside)
    return usage
