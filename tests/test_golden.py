"""Every golden file in tests/golden, or the folder that MOSTGAN_GOLDEN names, against our model
(spec §12).

Tolerances are relative, ‖out − ref‖ / ‖ref‖. augment.safetensors is test_augment.py's.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import kernels
from mostgan.checkpoint import from_released_names
from mostgan.config import ModelConfig
from mostgan.discriminator import Discriminator
from mostgan.loss import diversity, r1_penalty
from mostgan.model import Generator

FOLDER = Path(os.environ.get("MOSTGAN_GOLDEN") or Path(__file__).parent / "golden")
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}
FLOAT32, R1_GRADIENT, FLOAT64 = 2e-6, 1e-4, 1e-12


def read(name):
    with safe_open(FILES[name], "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = (file.metadata() or {}).get("config")
    return tensors, ModelConfig(**json.loads(config)) if config else None


def state_of(tensors, prefix="state."):
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def check(out, ref, tolerance, what):
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, not {tuple(ref.shape)}"
    error = ((out - ref).norm() / ref.norm()).item() if ref.norm() else out.norm().item()
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance}"


def names(prefix):
    return [name for name in FILES if name.startswith(prefix)]


def cases(prefix):
    """(file, case) of files that hold several cases, each with a prefix of its own on the keys."""
    return [
        (name, case)
        for name in names(prefix)
        for case in sorted({key.split(".")[0] for key in read(name)[0]})
    ]


def test_every_file_is_checked():
    assert FILES, f"no golden files in {FOLDER}"
    known = ("generator", "discriminator", "mostatt", "modconv", "augment")
    assert [name for name in FILES if not name.startswith(known)] == []


@pytest.mark.parametrize("name", names("generator"))
@torch.no_grad()
def test_generator(name):
    tensors, config = read(name)
    model = Generator(config)
    model.load_state_dict(from_released_names(state_of(tensors)), strict=True)
    z, t, noise, label = (tensors.get(f"in.{key}") for key in ("z", "t", "motion_noise", "label"))
    first_anchor = torch.zeros(len(z), dtype=torch.long)
    frames, scores = model(z, t.double(), noise, label=label, return_scores=True)
    ours = {
        "w": model.mapping(z, label),
        "motion_code": model.motion_codes(t.double(), noise, first_anchor, label),
        "frames": frames,
        "frames_psi0.7": model(z, t.double(), noise, label=label, psi=0.7),
    }
    if scores:
        ours["diversity"] = diversity(scores, config.num_ws).view(1)
    references = state_of(tensors, "out.")
    assert "frames" in references
    for key, reference in references.items():
        check(ours[key], reference, FLOAT32, key)


@pytest.mark.parametrize("name", names("discriminator"))
def test_discriminator(name):
    tensors, config = read(name)
    model = Discriminator(config)
    model.load_state_dict(from_released_names(state_of(tensors), discriminator=True), strict=True)
    frames, t, label = (
        tensors["in.frames"].requires_grad_(),
        tensors["in.t"],
        tensors.get("in.label"),
    )
    logits = model(frames, t, label)
    (frame_grads,) = torch.autograd.grad(logits.sum(), frames)
    penalty = 10 / 2 * r1_penalty(lambda x: model(x, t, label), frames)
    ours = {"logits": logits, "frame_grads": frame_grads, "r1_penalty_gamma10": penalty.view(1)}
    for key, reference in state_of(tensors, "out.").items():
        check(ours[key], reference, FLOAT32, key)

    penalty.backward()
    parameters = dict(model.named_parameters())
    for key, reference in from_released_names(
        state_of(tensors, "r1_grad."), discriminator=True
    ).items():
        gradient = parameters[key].grad
        gradient = torch.zeros_like(reference) if gradient is None else gradient
        if reference.norm() > 1e-6:
            check(gradient, reference, R1_GRADIENT, f"R1 gradient of {key}")
        else:
            assert gradient.norm() <= 1e-5, f"R1 gradient of {key} should vanish"


@pytest.mark.parametrize("name, case", cases("mostatt"))
def test_mostatt(name, case):
    tensors = state_of(read(name)[0], f"{case}.")
    inputs = tensors["content_weight"].requires_grad_(), tensors["motion_style"].requires_grad_()
    weight, score = kernels.mostatt(*inputs)
    check(weight, tensors["weight"], FLOAT64, "weight")
    check(diversity([score], 1).view(1), tensors["diversity"], FLOAT64, "diversity")
    for value, prefix in (
        ((weight * tensors["grad_weight"]).sum(), ""),
        (diversity([score], 1), "diversity_"),
    ):
        gradients = torch.autograd.grad(value, inputs, retain_graph=True)
        check(
            gradients[0], tensors[f"{prefix}grad_content_weight"], FLOAT64, f"{prefix}gradient of W"
        )
        check(
            gradients[1],
            tensors[f"{prefix}grad_motion_style"],
            FLOAT64,
            f"{prefix}gradient of the motion style",
        )


@pytest.mark.parametrize("name, case", cases("modconv"))
def test_modulated_convolution(name, case):
    """The FIR operations; and the ops in the order of a synthesis layer, without its bias and
    activation.
    """
    tensors = state_of(read(name)[0], f"{case}.")
    if case == "filter":
        return
    if case == "fir":
        for op in ("upsample2d", "downsample2d", "filter2d"):
            check(getattr(kernels, op)(tensors["x"]), tensors[op.removesuffix("2d")], FLOAT32, op)
        return
    weight = tensors["weight"] * tensors["content_style"][:, None, :, None, None]
    up = 2 if "up" in case else 1
    if "motion_style" in tensors:
        weight, score = kernels.mostatt(weight, tensors["motion_style"])
        check(diversity([score], 1).view(1), tensors["diversity"], FLOAT32, "diversity")
    y = kernels.conv2d_per_frame(tensors["x"], weight, up)
    if up == 2:
        y = kernels.fir(y, 1, gain=4.0)
    if case != "torgb":
        y = y * kernels.demodulation(weight)[:, :, None, None]
    check(y, tensors["y"], FLOAT32, case)
