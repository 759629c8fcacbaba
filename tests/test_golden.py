"""Every golden file in tests/golden, or the folder that MOSTGAN_GOLDEN names, against our model (spec §12).

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
    found = [name for name in FILES if name.startswith(prefix)]
    return found or [pytest.param(None, marks=pytest.mark.xfail(reason=f"no {prefix} file in {FOLDER}", run=False))]


def test_there_are_golden_files():
    assert FILES, f"no golden files in {FOLDER}"


@pytest.mark.parametrize("name", names("generator"))
@torch.no_grad()
def test_generator(name):
    tensors, config = read(name)
    model = Generator(config)
    model.load_state_dict(from_released_names(state_of(tensors)), strict=True)
    z, t, noise, label = (tensors.get(f"in.{key}") for key in ("z", "t", "motion_noise", "label"))
    frames, scores = model(z, t.double(), noise, label=label, return_scores=True)
    w = model.mapping(z, label)
    if "out.w" in tensors:
        check(w, tensors["out.w"], FLOAT32, "w")
    if "out.motion_code" in tensors:
        first_anchor = torch.zeros(len(z), dtype=torch.long)
        check(model.motion_codes(t.double(), noise, first_anchor, label), tensors["out.motion_code"], FLOAT32, "v")
    check(frames, tensors["out.frames"], FLOAT32, "frames")
    truncated = model(z, t.double(), noise, label=label, psi=0.7)
    check(truncated, tensors["out.frames_psi0.7"], FLOAT32, "frames at psi 0.7")
    if "out.diversity" in tensors:
        check(diversity(scores, config.num_ws).view(1), tensors["out.diversity"], FLOAT32, "diversity")


@pytest.mark.parametrize("name", names("discriminator"))
def test_discriminator(name):
    tensors, config = read(name)
    model = Discriminator(config)
    model.load_state_dict(from_released_names(state_of(tensors), discriminator=True), strict=True)
    frames, t, label = tensors["in.frames"].requires_grad_(), tensors["in.t"], tensors.get("in.label")
    logits = model(frames, t, label)
    check(logits, tensors["out.logits"], FLOAT32, "logits")
    (frame_grads,) = torch.autograd.grad(logits.sum(), frames)
    check(frame_grads, tensors["out.frame_grads"], FLOAT32, "gradients of the frames")

    penalty = r1_penalty(lambda x: model(x, t, label), frames)
    check(10 / 2 * penalty.view(1), tensors["out.r1_penalty_gamma10"], FLOAT32, "R1")
    (10 / 2 * penalty).backward()
    references = state_of(tensors, "r1_grad.")
    references = from_released_names(references, discriminator=True)
    parameters = dict(model.named_parameters())
    for key, reference in references.items():
        gradient = parameters[key].grad
        gradient = torch.zeros_like(reference) if gradient is None else gradient
        if reference.norm() > 1e-6:
            check(gradient, reference, R1_GRADIENT, f"R1 gradient of {key}")
        else:
            assert gradient.norm() <= 1e-5, f"R1 gradient of {key} should vanish"


def mostatt_cases():
    return sorted({key.split(".")[0] for key in read("mostatt")[0]}) if "mostatt" in FILES else []


@pytest.mark.parametrize("case", mostatt_cases())
def test_mostatt(case):
    tensors = state_of(read("mostatt")[0], f"{case}.")
    content_weight = tensors["content_weight"].requires_grad_()
    motion_style = tensors["motion_style"].requires_grad_()
    weight, score = kernels.mostatt(content_weight, motion_style)
    check(weight, tensors["weight"], FLOAT64, "weight")
    inputs = (content_weight, motion_style)
    for value, prefix in (((weight * tensors["grad_weight"]).sum(), ""), (diversity([score], 1), "diversity_")):
        gradients = torch.autograd.grad(value, inputs, retain_graph=True)
        check(gradients[0], tensors[f"{prefix}grad_content_weight"], FLOAT64, f"{prefix}gradient of W")
        check(gradients[1], tensors[f"{prefix}grad_motion_style"], FLOAT64, f"{prefix}gradient of the motion style")
    check(diversity([score], 1).view(1), tensors["diversity"], FLOAT64, "diversity")


@pytest.mark.parametrize("op, ours", [
    ("upsample", kernels.upsample2d), ("downsample", kernels.downsample2d), ("filter", kernels.filter2d),
])
def test_fir(op, ours):
    if "modconv" in FILES:
        tensors = read("modconv")[0]
        check(ours(tensors["fir.x"]), tensors[f"fir.{op}"], FLOAT32, op)


def modconv_cases():
    keys = read("modconv")[0] if "modconv" in FILES else ()
    return sorted({key.split(".")[0] for key in keys} - {"fir", "filter"})


@pytest.mark.parametrize("case", modconv_cases())
def test_modulated_convolution(case):
    """The ops in the order of a synthesis layer, without its bias and activation."""
    tensors = state_of(read("modconv")[0], f"{case}.")
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
