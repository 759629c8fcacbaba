"""Released files: snapshots of every kind are imported and compared, hostile ones refused;
fine-tuning; export.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mostgan
import sample
import train as training
from mostgan import checkpoint
from mostgan.checkpoint import __main__ as commands
from mostgan.checkpoint import pickles
from mostgan.checkpoint.export import WindowRenderer, export_file, export_window
from mostgan.checkpoint.released import read_released
from mostgan.config import ModelConfig, UserError, train_preset
from mostgan.discriminator import Discriminator
from mostgan.loss import diversity
from mostgan.model import Generator
from mostgan.motion import content_latent, motion_noise
from mostgan.prepare import pack_sky
from mostgan.rendering import to_uint8
from mostgan.run import what_to_resume
from tests import snapshots
from tests.snapshots import HOWS, Persistent, snapshot, write

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "released"
TINY = ModelConfig(
    resolution=32,
    channel_base=256,
    channel_max=12,
    z_dim=10,
    w_dim=14,
    motion_noise_dim=8,
    motion_code_dim=12,
    num_frequencies=6,
    max_period=64,
    motion_distance=16,
    motion_styles=4,
    motion_vector_dim=6,
    motion_resolutions=(16, 32),
    prenorm_resolutions=(8, 16, 32),
    motion_demod_only_resolutions=(16, 32),
    activation_clamp=256,
    max_num_frames=64,
    discriminator_hidden_dim=6,
    fps=30,
)


def networks(seed=0, **changes):
    """An untrained generator and discriminator. Their biases are not zero, so that each of them
    counts.
    """
    config = dataclasses.replace(TINY, **changes)
    torch.manual_seed(seed)
    made = Generator(config), Discriminator(config)
    for network in made:
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.data += 0.3 * torch.randn_like(parameter)
        network.eval().requires_grad_(False)
    made[0].mapping.w_avg.normal_()
    return made


def outputs(generator, discriminator, label=None):
    """Frames, also at ψ = 0.7, and logits."""
    config, t = (
        generator.config,
        torch.tensor([[0.0, 3.0, 19.5], [40.0, 41.0, 100.0]], dtype=torch.float64),
    )
    noise, first_anchor = motion_noise([3, 4], t, config)
    z = content_latent([1, 2], config.z_dim)
    frames = generator(z, t, noise, first_anchor, label=label)
    truncated = generator(z, t, noise, first_anchor, label=label, psi=0.7)
    return frames, truncated, discriminator(frames, t.float().round().clamp(max=40), label)


def imported(path, out, *options):
    """`python -m mostgan.checkpoint import`, in this process → generator and discriminator."""
    run(commands, "import", path, out, "--discriminator", *options)
    return mostgan.load(out), checkpoint.load_discriminator(out)


def run(program, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        program.main()


def same(made, expected, label=None):
    for ours, theirs in zip(outputs(*made, label), outputs(*expected, label)):
        assert torch.equal(ours, theirs) and ours.isfinite().all()


# ------------------------------------------------------------------------------- what is imported


@pytest.mark.parametrize("half", [True, False])
@torch.no_grad()
def test_a_snapshot_of_the_authors_code(tmp_path, half):
    """To 1e-5 of what the authors' own networks give, in both readings of half precision, from the
    file alone.
    """
    with safe_open(GOLDEN / "clamped.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        facts = json.loads(file.metadata()["facts"])
    options = [] if half else ["--half-precision"]
    generator, discriminator = imported(GOLDEN / "clamped.pkl", tmp_path / "made", *options)
    config = generator.config
    assert config.motion_distance == facts["motion_distance"] == 64
    assert config.shortest_period == facts["shortest_period"] == 16
    assert config.activation_clamp == facts["activation_clamp"] == 256 and config.fps == 30
    assert config.prenorm_resolutions == (
        tuple(facts["half_precision_resolutions"]) if half else ()
    )
    z, t, noise = tensors["in.z"], tensors["in.t"].double(), tensors["in.motion_noise"]
    frames, scores = generator(z, t, noise, return_scores=True)
    kind = "out.half." if half else "out."
    for ours, name in (
        (frames, kind + "frames"),
        (generator(z, t, noise, psi=0.7), kind + "frames_psi0.7"),
        (diversity(scores, config.num_ws).view(1), kind + "diversity"),
        (
            generator.motion_codes(t, noise, torch.zeros(len(z), dtype=torch.long)),
            "out.motion_code",
        ),
        (discriminator(tensors["in.frames"], tensors["in.t"]), "out.logits"),
    ):
        assert (ours - tensors[name]).norm() <= 1e-5 * tensors[name].norm(), name


VARIATIONS = {
    "as usual": {},
    "K = 0, StyleGAN-V": dict(
        motion_styles=0,
        motion_resolutions=(),
        motion_demod_only_resolutions=(),
        motion_difference=False,
        discriminator_hidden_dim=12,
        motion_vector_dim=128,
    ),
    "K = 1": dict(motion_styles=1),
    "K = 6": dict(motion_styles=6),
    "K = 10": dict(motion_styles=10),
    "rank 3": dict(rank=3),
    "shortest period": dict(motion_distance=64, shortest_period=16),
    "no clamp, no half precision": dict(
        activation_clamp=None, prenorm_resolutions=(), motion_demod_only_resolutions=()
    ),
    "another clamp": dict(activation_clamp=1.5),
    "64 pixels": dict(
        resolution=64,
        motion_resolutions=(16, 32, 64),
        prenorm_resolutions=(8, 16, 32, 64),
        motion_demod_only_resolutions=(16, 32, 64),
    ),
    "512 pixels": dict(
        resolution=512,
        channel_base=1024,
        channel_max=4,
        prenorm_resolutions=(64, 128, 256, 512),
        motion_demod_only_resolutions=(),
        concat_resolution=64,
    ),
    "older layout": dict(hypernetwork="affine"),
    "without condition": dict(time_condition=False),
    "labels": dict(num_labels=5),
    "channels that the maximum cuts everywhere": dict(channel_base=4096),
}


@pytest.mark.parametrize("changes", VARIATIONS.values(), ids=VARIATIONS.keys())
@torch.no_grad()
def test_variations(tmp_path, changes):
    """A snapshot of a network, imported, is that network to the bit, and has its configuration."""
    made = networks(**changes)
    path = write(tmp_path / "snapshot.pkl", snapshot(*made, last=networks(1, **changes)[0]))
    found = imported(path, tmp_path / "out")
    assert found[0].config == made[0].config
    label = (
        torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0.25, 0.75, -1]])
        if changes.get("num_labels")
        else None
    )
    same(found, made, label)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("protocol", range(6))
def test_snapshots_in_every_format(tmp_path, how, protocol):
    if "torch.save" in how and protocol < 2:
        pytest.skip("torch.save itself wants protocol 2 or more")
    made, last = networks(), networks(1)[0]
    path = write(tmp_path / "snapshot.pkl", snapshot(*made, last=last), how, protocol)
    found = read_released(path, training=True)
    assert found.config == TINY and found.provenance["class"] == "Generator"
    for name, network in (("G_ema", made[0]), ("D", made[1]), ("G", last)):
        expected = network.state_dict()
        assert found.networks[name].keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.networks[name].items())
    only = read_released(path, "G").networks
    assert torch.equal(only["G"]["mapping.w_avg"], last.mapping.w_avg) and list(only) == ["G"]


@torch.no_grad()
def test_labels_one_hot_and_vectors(tmp_path):
    """Classes get a mean w each, which rendering truncates to; vectors of floats do not."""
    made = networks(num_labels=3)
    classes = write(tmp_path / "classes.pkl", snapshot(*made, labels=torch.eye(3)[[0, 2, 2, 1]]))
    vectors = write(tmp_path / "vectors.pkl", snapshot(*made, labels=torch.rand(4, 3)))
    of_classes, _ = imported(classes, tmp_path / "classes")
    of_vectors, _ = imported(vectors, tmp_path / "vectors")
    assert of_vectors.mapping.class_means is None and of_classes.mapping.class_means.shape == (
        3,
        14,
    )
    z = torch.randn(20_000, 10)
    for k, mean in enumerate(of_classes.mapping.class_means):
        w = made[0].mapping(z, torch.eye(3)[k].expand(len(z), -1))
        assert (w.mean(dim=0) - mean).norm() < 4 * w.std(dim=0).norm() / 1000**0.5
    window = next(mostgan.render(of_classes, 5, label=2, psi=0.0, frames=1))
    t = torch.zeros(1, 1, dtype=torch.float64)
    noise, first_anchor = motion_noise([5], t, of_classes.config)
    condition = torch.eye(3)[2:]
    centre = of_classes.mapping.class_means[2:]
    motion = of_classes.motion(centre, t, noise, first_anchor, condition)
    frames, _ = of_classes.synthesis(of_classes.synthesis.content(centre), *motion)
    assert (window[0].int() - to_uint8(frames).int()).abs().max() <= 1
    same_class = next(mostgan.render(of_classes, 5, label=condition[0], psi=0.0, frames=1))
    assert torch.equal(window, same_class)
    z = content_latent([5], 10)
    # Spec §3.
    assert torch.equal(of_classes.content_code(z, condition, 0.0)[0], made[0].mapping.w_avg)
    for generator in (of_vectors, made[0]):  # and so rendering where there are no classes
        flat = [
            next(mostgan.render(g, 5, label=2, psi=0.0, frames=1)) for g in (generator, made[0])
        ]
        assert torch.equal(*flat)
    with pytest.raises(UserError, match="a vector of 3 numbers"):
        mostgan.render(of_vectors, 0, label=[0.5, 0.5])
    some = [
        next(mostgan.render(of_vectors, 0, label=label, frames=1))
        for label in ([0.5, 0.1, 2.0], [0.5, 0.1, -2.0])
    ]
    assert not torch.equal(*some)


@pytest.mark.parametrize("distance", ["${dataset.motion_z_distance}", 64, "${a.b}", 64.0])
def test_a_distance_by_reference_and_as_a_number(tmp_path, distance):
    made = networks(motion_distance=64, shortest_period=16)
    changes = {
        "model.generator.motion.motion_z_distance": distance,
        "a": {"b": "${dataset.motion_z_distance}"},
    }
    found = read_released(write(tmp_path / "snapshot.pkl", snapshot(*made, changes=changes)))
    assert found.config.motion_distance == 64 and found.config.shortest_period == 16


def nested(depth):
    """A tuple that has 2^depth parts, if each is counted as often as it is there."""
    made = ()
    for _ in range(depth):
        made = (made, made)
    return made


CONTRADICTIONS = {
    "K": ({"model.generator.motion_num": 6}, None, "motion_styles is 6 by .*motion_num, but 4 by"),
    "rank": ({"model.generator.rank": 2}, None, "rank is 2 .* but 1 by"),
    "period": (
        {"model.generator.time_enc.min_period_len": 8},
        None,
        "shortest_period is 8 by .* 16 by its freq",
    ),
    "labels": ({"dataset.c_dim": 2}, None, "num_labels is .*2|num_labels is .*0"),
    "motion resolutions": (
        {"model.generator.mod_layers": "16"},
        None,
        "motion_resolutions is 16 by .* 16, 32 by",
    ),
    "frames": ({"sampling.num_frames_per_video": 4}, None, "frames_per_clip is 4 by .* but 3 by"),
    "hidden width": (
        {"model.discriminator.motion_dim": 7},
        None,
        "discriminator_hidden_dim is 7 .* 6 by",
    ),
    "clamps": (
        {},
        {"synthesis.b8.conv1": {"conv_clamp": 128}},
        "activation_clamp is .*128|activation_clamp is .*256",
    ),
    "lstm": ({"model.generator.motion.gen_strategy": "lstm"}, None, "motion.gen_strategy = lstm"),
    "noise": ({"model.generator.use_noise": True}, None, "use_noise = True"),
    "kernel": ({"model.generator.motion.kernel_size": 5}, None, "motion.kernel_size = 5"),
    "norm": ({}, {"synthesis.b8.conv1": {"instance_norm": True}}, "instance_norm = True"),
    "spectral": ({"model.discriminator.spectral_norm": True}, None, "spectral_norm = True"),
    "a clamp elsewhere": ({}, {"b16.skip": {"conv_clamp": 256}}, "b16.skip has a conv_clamp"),
    "a clamp of a hypernetwork": (
        {},
        {"synthesis.b16.conv1.hypernet.conv0": {"conv_clamp": 256}},
        "hypernet.conv0 has a conv_clamp",
    ),
    "a layer without clamp": (
        {},
        {"synthesis.b16.conv1": {"conv_clamp": None}},
        "activation_clamp is None by conv_clamp of synthesis.b16.conv1, but 256 by",
    ),
    "activation": ({}, {"synthesis.b8.conv1": {"activation": "relu"}}, "activation = relu"),
    "kernel of a layer": ({}, {"b8.conv0": {"kernel_size": 5}}, "b8.conv0 has kernel_size = 5"),
    "half precision": ({}, {"synthesis.b8": {"use_fp16": 1}}, "use_fp16 = 1"),
    "a tuple of tuples": ({"dataset.motion_z_distance": nested(60)}, None, "must be a number"),
    "a scalar of numpy": ({"dataset.motion_z_distance": np.float32(64)}, None, "must be a number"),
    "far": (
        {"model.generator.motion.motion_z_distance": 1e300, "dataset.motion_z_distance": 16},
        None,
        "must be a number",
    ),
    "dangling": ({"dataset.motion_z_distance": "${nowhere.at}"}, None, "which is not there"),
    "circular": (
        {"dataset.motion_z_distance": "${dataset.motion_z_distance}"},
        None,
        "refers to itself",
    ),
    "many digits": ({"dataset.motion_z_distance": 10**5000}, None, "makes no sense"),
    "a list": ({"dataset.motion_z_distance": [64]}, None, "must be a number"),
    "no number": ({"dataset.motion_z_distance": "far"}, None, "is far, but must be a number"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_the_configuration_and_the_tensors_disagree_on(tmp_path, case):
    changes, attributes, words = CONTRADICTIONS[case]
    path = write(
        tmp_path / "snapshot.pkl", snapshot(*networks(), changes=changes, attributes=attributes)
    )
    with pytest.raises(UserError, match=words):
        read_released(path, discriminator=True)


def test_what_only_the_tensors_tell_is_said_to_be_inferred(tmp_path, capsys):
    made = networks(activation_clamp=None)
    path = write(tmp_path / "snapshot.pkl", snapshot(*made, with_cfg=False))
    assert imported(path, tmp_path / "out")[0].config == dataclasses.replace(
        made[0].config, fps=25.0
    )
    inferred = capsys.readouterr().out.partition("inferred from the tensors alone: ")[2]
    for name in ("motion_distance", "motion_styles", "rank", "w_dim"):
        assert name in inferred
    bare = tmp_path / "bare.safetensors"
    save_file(snapshots.released_state(made[0]), bare)
    assert "by default: activation_clamp" in read_released(bare).notes
    with pytest.raises(UserError, match="motion_distance is 8 by --motion-distance, but 16 by"):
        read_released(write(tmp_path / "told.pkl", snapshot(*made)), motion_distance=8)


# -------------------------------------------------------------- settings that no snapshot tells


GROUPS = [10**5000, 10**30, 2**16 + 1, 0, -1, True, 4.0, None]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: type(group).__name__)
def test_a_group_size_that_is_none(tmp_path, group):
    whole = snapshot(*networks())
    whole["D"].state["_modules"]["b4"].state["_modules"]["mbstd"] = Persistent(
        "Std", group_size=group
    )
    path = write(tmp_path / "snapshot.pkl", whole)
    with pytest.raises(UserError, match="group_size that is no whole number from 1 to 65,536"):
        read_released(path, discriminator=True)
    assert read_released(path).config.mbstd_group == 4  # without D it is of no concern


DTYPES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.bool]
OF_A_TYPE = [
    "mapping.fc0.weight",
    "synthesis.motion_encoder.time_encoder.freqs",
    "synthesis.b8.conv0.resample_filter",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OF_A_TYPE)
def test_weights_of_other_types_are_refused(tmp_path, dtype, name):
    state = snapshots.released_state(networks()[0])
    save_file(state | {name: state[name].to(dtype)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match=f"its G_ema has {name} of {dtype}, but weights are"):
        read_released(tmp_path / "state.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_each_floating_type_become_float32(tmp_path, dtype):
    state, name = snapshots.released_state(networks()[0]), "synthesis.b8.conv0.weight"
    save_file(state | {name: state[name].to(dtype)}, tmp_path / "state.safetensors")
    made = read_released(tmp_path / "state.safetensors").networks["G_ema"][name]
    assert made.dtype == torch.float32 and torch.equal(made, state[name].to(dtype).float())
    large = torch.full_like(state[name], 1e200, dtype=torch.float64)
    save_file(state | {name: large}, tmp_path / "large.safetensors")
    with pytest.raises(UserError, match="not finite in float32"):
        read_released(tmp_path / "large.safetensors")


def test_half_precision_where_it_is_not_stored(tmp_path):
    """The release's four highest resolutions, but not 4: pre-normalized, and motion as demodulation
    factor.
    """
    generator, _ = networks(activation_clamp=None)
    state = snapshots.released_state(generator)
    # One network alone.
    alone = write(tmp_path / "G.pkl", snapshots.pickled_network(state, "Generator"))
    found = read_released(alone)
    assert found.config.prenorm_resolutions == (8, 16, 32) and "four highest" in found.notes
    assert found.config.motion_demod_only_resolutions == (16, 32)
    full = read_released(alone, half_precision=()).config
    assert full.prenorm_resolutions == full.motion_demod_only_resolutions == ()
    with pytest.raises(UserError, match="half_precision"):
        read_released(alone, half_precision=(64,))


@torch.no_grad()
def test_plain_state_dicts(tmp_path):
    made = networks(activation_clamp=None)
    state = snapshots.released_state(made[0])
    judge = snapshots.released_state(made[1], discriminator=True)
    save_file(
        state | {f"D.{name}": tensor for name, tensor in judge.items()},
        tmp_path / "state.safetensors",
    )
    same(imported(tmp_path / "state.safetensors", tmp_path / "made"), made)
    torch.save(state, tmp_path / "state.pt")
    found = read_released(tmp_path / "state.pt").networks["G_ema"]
    assert all(torch.equal(value, found[name]) for name, value in made[0].state_dict().items())
    bare = {
        name: value
        for name, value in state.items()
        if not name.endswith(("freqs", "phase_scales", "filter"))
    }
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="--motion-distance"):
        read_released(tmp_path / "bare.safetensors")
    config = read_released(tmp_path / "bare.safetensors", motion_distance=64).config
    assert (config.motion_distance, config.shortest_period) == (64, None)
    config = read_released(tmp_path / "state.safetensors", motion_distance=64).config
    assert (config.motion_distance, config.shortest_period) == (64, 16)  # as the frequencies tell
    for distance in (0, -1):
        with pytest.raises(UserError, match="motion_distance"):
            read_released(tmp_path / "state.safetensors", motion_distance=distance)
    freqs = "synthesis.motion_encoder.time_encoder.freqs"
    save_file(state | {freqs: state[freqs].flip(1)}, tmp_path / "order.safetensors")
    with pytest.raises(
        UserError, match="longest period first|is not what this configuration computes"
    ):
        read_released(tmp_path / "order.safetensors", motion_distance=16)


def test_a_sample_of_an_import_plays_at_its_rate(tmp_path):
    run(
        commands,
        "import",
        write(tmp_path / "snapshot.pkl", snapshot(*networks())),
        tmp_path / "released",
    )
    assert json.loads((tmp_path / "released" / "config.json").read_text())["fps"] == 30
    out = tmp_path / "a.mp4"
    sample.sample(sample.Options(checkpoint=tmp_path / "released", frames=3, out=out))
    with av.open(str(out)) as video:
        assert video.streams.video[0].average_rate == 30
        assert len(list(video.decode(video=0))) == 3
    with pytest.raises(UserError, match="is there already"):
        commands.import_released(tmp_path / "snapshot.pkl", tmp_path / "released")


# ------------------------------------------------------------------------------------ fine-tuning


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sky.clips"
    pack_sky(folder, 32, 10, 40)
    return folder


def train(*arguments):
    options, resume = training.parse(list(map(str, arguments)))
    training.train(options.config, options.out, resume)


def states(path):
    return checkpoint.read_networks(path)


def differs(ours, theirs):
    """The distance of two states, relative to the second."""
    return max(
        ((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-9)).item()
        for name in theirs
    )


@pytest.mark.slow
def test_fine_tuning_starts_where_the_snapshot_is(tmp_path, clips, capsys):
    made, last = networks(shortest_period=8), networks(1, shortest_period=8)[0]
    last.mapping.w_avg.copy_(made[0].mapping.w_avg)
    path = write(tmp_path / "snapshot.pkl", snapshot(*made, last=last))
    run(commands, "import", path, tmp_path / "released", "--training")
    some = ("--preset", "tiny", "--data", clips, "--batch-clips", 4, "--log-kframes", 0.012)
    train(
        *some,
        "--start-from",
        tmp_path / "released",
        "--out",
        tmp_path / "run",
        "--total-kframes",
        0.024,
    )
    said = capsys.readouterr().out
    assert "its average, its generator, its discriminator" in said
    training.save_grids(tmp_path, mostgan.load(tmp_path / "released"), None, 0, 25)
    for name in ("samples-000000k.png", "shared-motion-000000k.png"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    found = states(tmp_path / "run")
    # Two steps at a half-life of 500.
    assert differs(found["ema"], states(tmp_path / "released")["ema"]) < 0.05
    for name, network in (("G", last), ("D", made[1])):
        assert 0 < differs(found[name], network.state_dict()) < 2  # Adam's first steps
    config = checkpoint.read_config(checkpoint.find(tmp_path / "run"))
    assert config == dataclasses.replace(made[0].config, fps=25)  # that of the clips
    train("--resume", tmp_path / "run", "--total-kframes", 0.036)
    again = states(tmp_path / "run")
    assert differs(again["ema"], found["ema"]) < 0.05


def test_a_new_run_takes_what_a_checkpoint_has(tmp_path, capsys):
    """Without D and the last G, with them, and from a run of our own."""
    made, last = networks(), networks(1)[0]
    path = write(tmp_path / "snapshot.pkl", snapshot(*made, last=last))
    for name, options, words in (
        ("average", [], "from its average, for it has no other, a new discriminator"),
        ("judged", ["--discriminator"], "from its average, for it has no other, its discriminator"),
        ("whole", ["--training"], "its generator, its discriminator"),
    ):
        run(commands, "import", path, tmp_path / name, *options)
        config = training.fine_tuning(train_preset("tiny", "sky"), str(tmp_path / name))
        assert config.model == dataclasses.replace(TINY, fps=None) and config.ema_rampup == 0
        state = training.new_state(config, torch.device("cpu"))
        assert words in training.start_from(state, str(tmp_path / name))
        expected = {"G": last if name == "whole" else made[0], "D": made[1], "ema": made[0]}
        for part, network in expected.items():
            equal = not differs(getattr(state, part).state_dict(), network.state_dict())
            assert equal == (part != "D" or name != "average")
    tensors = {f"D.{key}": value for key, value in made[1].state_dict().items()}
    tensors |= {f"G.{key}": value for key, value in last.state_dict().items()}
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", 7, TINY, made[0].state_dict(), tensors, {"step": 7})
    assert not differs(states(tmp_path / "run")["G"], last.state_dict())


def test_starts_that_cannot_be(tmp_path, clips):
    path = write(tmp_path / "snapshot.pkl", snapshot(*networks()))
    run(commands, "import", path, tmp_path / "released", "--training")
    some = ("--preset", "tiny", "--data", clips, "--out", tmp_path / "run")
    for arguments, words in (
        (["--start-from", path], f"mostgan.checkpoint import {path} runs/released --training"),
        (["--start-from", tmp_path], "neither a checkpoint"),
        (
            [
                "--start-from",
                tmp_path / "released",
                "--rank",
                3,
                "--motion-styles",
                6,
                "--motion-distance",
                32,
            ],
            r"no tensors for motion_styles 6 \(it has 4\), rank 3 \(it has 1\): leave",
        ),
        (["--start-from", tmp_path / "released", "--resolution", 64], "resolution|pixels"),
    ):
        with pytest.raises(UserError, match=words):
            train(*some, *arguments)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="imported checkpoint, not a run.*--start-from"):
        what_to_resume(None, str(tmp_path / "released"))


# -------------------------------------------------------------------------- what must not happen


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that exists once something of a pickle was executed; the source that snapshots carry
    makes it.
    """
    monkeypatch.setattr(
        Persistent, "source", f"import pathlib; pathlib.Path({str(tmp_path / 'canary')!r}).touch()"
    )
    return tmp_path / "canary"


def test_tensors_of_every_kind(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = [
        base,
        base.transpose(0, 2),
        base[1, :, ::2],
        base.half(),
        base.bfloat16(),
        base.long(),
        base.bool(),
        base.double().to(memory_format=torch.preserve_format),
        torch.tensor(3.5),
        torch.nn.Parameter(base),
        base.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    ]
    tensors[3].note = "an attribute"

    def check(path, what):
        with pickles.opened(path) as found:
            read = pickles.read_tensors({str(i): tensor for i, tensor in enumerate(found)})
        for made, tensor in zip(read.values(), tensors, strict=True):
            assert (
                made.dtype == tensor.dtype and torch.equal(made, tensor) and made.is_contiguous()
            ), what

    for how in HOWS:
        check(write(tmp_path / "tensors.pkl", tensors, how, 4), how)
    path = write(tmp_path / "tensors.pkl", tensors, "torch.save legacy", 2)
    raw = path.read_bytes()
    assert raw.count(b"X\3\0\0\0cpu") and raw.count(b"ctorch\nFloatStorage")
    path.write_bytes(
        raw.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0").replace(b"ctorch\nFl", b"ctorch.cuda\nFl")
    )
    check(path, "of a GPU")


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def tensor_call(size, stride, offset=0, storage=None):
    if storage is None:
        storage = torch.zeros(4)._typed_storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


def load_bytes(data):
    return Call(torch.storage._load_from_bytes, data)


def zip_of(data, name="archive/data.pkl", **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr(name, data)
    return file.getvalue()


def with_buffer(name, value):
    """A snapshot in good order, but for one buffer of G_ema."""
    whole = snapshot(*networks())
    whole["G_ema"].state["_modules"]["mapping"].state["_buffers"][name] = value
    return whole


def with_w_avg(value):
    return with_buffer("w_avg", value)


def executing(canary):
    """What would touch the canary, if unpickled as pickle.load does: name in the message →
    value.
    """
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    system, evaluate = Call(os.system, f"touch {canary}"), Call(eval, touch)
    legacy = io.BytesIO()
    torch.save([system], legacy, _use_new_zipfile_serialization=False)
    in_zip = zip_of(pickle.dumps(evaluate, protocol=2))
    meta = dict(module_src="", class_name="x", state={}, canary=str(canary))
    return {
        "posix.system": system,
        "builtins.eval": evaluate,
        "builtins.exec": Call(exec, touch),
        "posix.system, a weight": with_w_avg(system),
        "builtins.eval, in G": dict(snapshot(*networks()), G=evaluate),
        "posix.system, a storage": with_w_avg(tensor_call((4,), (1,), storage=system)),
        "posix.system, within a storage": with_w_avg(
            tensor_call((4,), (1,), storage=load_bytes(legacy.getvalue()))
        ),
        "builtins.eval, within a zipped storage": with_w_avg(
            tensor_call((4,), (1,), storage=load_bytes(in_zip))
        ),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "builtins.getattr": Call(getattr, "", "join"),
        f"{__name__}._touch": Call(_touch, meta),
        "posix.system, in an attribute": dict(
            snapshot(*networks()), training_set_kwargs={"callback": [system]}
        ),
    }


def _touch(meta):
    Path(meta["canary"]).touch()


EXECUTING = [
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "posix.system, a weight",
    "builtins.eval, in G",
    "posix.system, a storage",
    "posix.system, within a storage",
    "builtins.eval, within a zipped storage",
    "subprocess.Popen",
    "builtins.getattr",
    f"{__name__}._touch",
    "posix.system, in an attribute",
]


def refused(path, out, *words):
    """The import is refused with one line that has these words, and leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as error:
        commands.import_released(path, out)
    text = str(error.value)
    assert "\n" not in text and text.isprintable() and len(text) < 600 and str(path) in text, text
    assert all(word in text for word in words), text
    assert sorted(out.parent.iterdir()) == before, "it left something"


@pytest.mark.parametrize("case", EXECUTING)
@pytest.mark.parametrize("protocol", [2, 5])
def test_nothing_is_executed(tmp_path, canary, case, protocol):
    value = executing(canary)[case]
    path = write(tmp_path / "evil.pkl", value, protocol=protocol)
    module, _, name = case.partition(",")[0].rpartition(".")
    # As Python 2 called it.
    module = {"subprocess": "commands"}.get(module, module) if protocol == 2 else module
    refused(path, tmp_path / "out", f"{module}.{name}", "nothing in it was executed")
    assert not canary.exists()
    if case != "builtins.getattr":  # which by itself does nothing
        try:
            with snapshots.released_modules():
                pickle.loads(path.read_bytes())
        except Exception:
            pass
        for _ in range(100):
            if not canary.exists() and case == "subprocess.Popen":
                time.sleep(0.1)
        assert canary.exists(), "the test is no test: what it feeds is harmless"


def hostile():
    """name → (what pickles to it or the bytes, words of the refusal)."""
    itself, cycle = Persistent("Layer"), {}
    itself.state["_modules"]["again"] = itself
    cycle["G_ema"] = cycle
    deep = Persistent("Layer")
    for _ in range(30):
        deep = _parent(deep)
    wide = Persistent("Layer")
    for _ in range(15):  # 2¹⁵ paths to the same module
        wide = _parent(wide, wide)
    floats, big = torch.zeros(4)._typed_storage(), torch.zeros(2**20)
    huge = b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc."
    amplified = (
        b"\x80\x02c_codecs\nencode\nX"
        + (2**20).to_bytes(4, "little")
        + b"a" * 2**20
        + b"\x85q\x000"
    )
    amplified += b"c_codecs\nencode\nh\x00R" * 2000 + b"."
    file = io.BytesIO()
    torch.save(torch.zeros(1000)._typed_storage(), file, _use_new_zipfile_serialization=False)
    cut_storage, longer = (
        file.getvalue()[:-9],
        file.getvalue().replace((1000).to_bytes(8, "little"), (999).to_bytes(8, "little")),
    )
    file = io.BytesIO()
    torch.save(torch.zeros(2**20)._typed_storage(), file, _use_new_zipfile_serialization=False)
    loaded = file.getvalue()
    ones = b"K\x01" * 100_000
    numbered = b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(100_000))
    bomb = zip_of(b"\0" * 2**27, compression=zipfile.ZIP_DEFLATED)
    return {
        "a name alone": (dict(snapshot(*networks()), callback=os.system), "posix.system"),
        "giant shape": (
            with_w_avg(tensor_call((10**6, 10**6), (10**6, 1))),
            "does not fit its storage",
        ),
        "giant shape, stride 0": (
            with_w_avg(tensor_call((10**6, 10**6), (0, 0))),
            "does not fit its storage",
        ),
        "shape beyond integers": (with_w_avg(tensor_call((10**5000,), (0,))), "no proper shape"),
        "negative offset": (with_w_avg(tensor_call((4,), (1,), -1)), "no proper shape"),
        "offset outside": (with_w_avg(tensor_call((4,), (1,), 1)), "does not fit"),
        "negative stride": (with_w_avg(tensor_call((2,), (-1,), 2)), "no proper shape"),
        "no numbers": (with_w_avg(tensor_call((0,), (1,))), "of shape (0,)"),
        "storage cut short": (
            with_w_avg(tensor_call((4,), (1,), storage=load_bytes(cut_storage))),
            "cut short",
        ),
        "storage of another size": (
            with_w_avg(tensor_call((4,), (1,), storage=load_bytes(longer))),
            "storage",
        ),
        "one storage many times": (
            {"G_ema": _buffers(**{f"b{i}": _reading(loaded) for i in range(9)})},
            "memory",
        ),
        "state of a function": (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
            "state of a function",
        ),
        "a set of sets": (b"\x80\x04\x8f(\x8f\x90.", "damaged"),
        "tensor for a storage": (with_w_avg(tensor_call((4,), (1,), storage=[])), "no storage"),
        "a shape of bytes": (with_w_avg(tensor_call(b"12", (1,), storage=floats)), "shape"),
        "one memory many times": (
            {"G_ema": _buffers(**{f"b{i}": big for i in range(9)})},
            "overlap",
        ),
        "module within itself": ({"G_ema": itself}, "contains itself"),
        "dictionary of itself": (cycle, "where a network should be"),
        "modules 30 deep": ({"G_ema": deep}, "deep"),
        "modules shared": ({"G_ema": wide}, "2000 modules"),
        "list": ([1, 2], "no networks by name"),
        "number": (7, "no networks by name"),
        "no network": ({"a": 1}, "has no G_ema, only a"),
        "no state": ({"G_ema": torch.nn.Linear(1, 1)}, "generator"),
        "list for a module": ({"G_ema": [1]}, "where a network should be"),
        "control characters": ({"G_ema": _buffers(**{"\x1b[31m\n": big})}, "proper name"),
        "another architecture": (with_buffer("noise_strength", torch.ones(1)), "noise_strength"),
        "numbers that are not finite": (with_w_avg(torch.full((14,), torch.nan)), "not finite"),
        "another filter": (
            with_buffer("resample_filter", torch.ones(4, 4)),
            "resample_filter is not what",
        ),
        "length of 2⁶²": (huge, "damaged"),
        "memo of 2³²": (b"\x80\x02]r\xff\xff\xff\xff.", "no networks"),
        "memory by repetition": (amplified, "more memory"),
        "tuples 300,000 deep": (b"\x80\x02)" + b"\x85" * 300_000 + b".", "no networks"),
        "a deep key": (b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.", "has no G_ema"),
        "a key of 2⁶⁰ parts": (b"\x80\x02})" + b"2\x86" * 60 + b"Ns.", "has no G_ema"),
        "a set with 2⁶⁰ parts": (b"\x80\x04\x8f()" + b"2\x86" * 60 + b"\x90.", "no networks"),
        "sets by repetition": (copies(b"__builtin__\nset", b"]q\x00(" + ones + b"e0"), "steps"),
        "dictionaries by repetition": (
            copies(b"collections\nOrderedDict", b"}q\x00(" + numbered + b"u0"),
            "steps",
        ),
        "steps without end": (b"\x80\x02" + b"}" * 5_000_000 + b".", "steps"),
        "extension registry": (b"\x80\x02\x82\x01.", "damaged"),
        "protocol 0's INST": (b"(ios\nsystem\n.", "os.system"),
        "persistent id": (b"\x80\x02NQ.", "outside of itself"),
        "unknown instruction": (b"\x80\x02\xff.", "damaged"),
        "zip bomb": (bomb, "compressed"),
        "no zip of ours": (zip_of(b"x", "readme.txt"), "not one of torch.save"),
        "empty": (b"", "at least one"),
        "text": (b"<html>not found</html>", "damaged"),
    }


def copies(function, made):
    """A pickle that makes a container, and then 100,000 others of it."""
    call = b"c" + function + b"\nq\x02h\x00\x85R"
    return b"\x80\x02" + made + b"](" + call + b"h\x02h\x00\x85R" * 100_000 + b"e."


def _reading(loaded):
    """A tensor whose storage is made of these bytes, which the pickle holds once."""
    return Call(torch._utils._rebuild_tensor_v2, load_bytes(loaded), 0, (2**20,), (1,), False, {})


def _parent(*children):
    module = Persistent("Layer")
    module.state["_modules"] = {f"m{i}": child for i, child in enumerate(children)}
    return module


def _buffers(**tensors):
    module = Persistent("Layer")
    module.state["_buffers"] = tensors
    return module


def test_hostile_files_are_refused(tmp_path, canary):
    sys.setrecursionlimit(5000)  # for pickle, to write what nests
    for case, (value, word) in hostile().items():
        path = tmp_path / f"{case}.pkl"
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            write(path, value, protocol=4)
        started = time.perf_counter()
        refused(path, tmp_path / "out", word)
        assert time.perf_counter() - started < 20, case
    assert not canary.exists()


@pytest.mark.parametrize("how", HOWS)
def test_truncated_anywhere(tmp_path, canary, how):
    whole = write(tmp_path / "whole.pkl", snapshot(*networks()), how, 4).read_bytes()
    for part in range(50):
        (tmp_path / "cut.pkl").write_bytes(whole[: part * (len(whole) - 1) // 49])
        refused(tmp_path / "cut.pkl", tmp_path / "out")
    assert not canary.exists()


def test_damaged_bytes(tmp_path, canary):
    """Any byte changed: refused in one line, or read as other numbers; never another exception."""
    whole, rng = (
        write(tmp_path / "whole.pkl", snapshot(*networks()), protocol=4).read_bytes(),
        random.Random(0),
    )
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "damaged.pkl").write_bytes(damaged)
        try:
            read_released(tmp_path / "damaged.pkl")
        except UserError as error:
            assert str(error).isprintable()
    assert not canary.exists()


def test_the_command_line(tmp_path, canary):
    """One line on standard error and exit status 2 for what is refused."""
    path = write(tmp_path / "evil.pkl", Call(os.system, f"touch {canary}"))
    result = python("-m", "mostgan.checkpoint", "import", path, tmp_path / "out")
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and "posix.system" in result.stderr
    )
    assert not canary.exists() and not (tmp_path / "out").exists()


def python(*args, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


STRANGER = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mostgan", "kernels"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file

program = torch.export.load("window.pt2")
operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
inputs = load_file("inputs.safetensors")
frames = {}
for count in (1, 4, 9):
    t, noise = inputs["t"][:, :count].contiguous(), inputs["noise"]
    arguments = inputs["z"], t, noise, inputs["first_anchor"], inputs["psi"]
    frames[str(count)] = program.module()(*arguments)
save_file(frames, "frames.safetensors")
print("\\n".join(operations))
"""


@pytest.mark.slow
def test_export_runs_without_this_package(tmp_path, canary, capsys):
    commands.import_released(
        write(tmp_path / "snapshot.pkl", snapshot(*networks())), tmp_path / "released"
    )
    commands.export(tmp_path / "released", tmp_path / "window.pt2")
    assert "float64 [1, T]" in capsys.readouterr().out
    generator = checkpoint.load(tmp_path / "released")
    t = 1000.5 + 7 * torch.arange(9, dtype=torch.float64)[None]
    noise, first_anchor = motion_noise([3], t, generator.config)
    z, psi = content_latent([3], 10), torch.tensor(0.6)
    save_file(
        dict(z=z, t=t, noise=noise, first_anchor=first_anchor, psi=psi),
        tmp_path / "inputs.safetensors",
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    for operation in result.stdout.split("\n"):
        assert operation.startswith(("aten.", "<built-in function")) or not operation, operation
    rendered = checkpoint.read_tensors(tmp_path / "frames.safetensors")
    for count in (1, 4, 9):
        expected = to_uint8(generator(z, t[:, :count], noise, first_anchor, psi=0.6)).unflatten(
            0, (1, count)
        )
        assert (
            rendered[str(count)].shape == expected.shape
            and rendered[str(count)].dtype == torch.uint8
        )
        difference = (rendered[str(count)].int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert expected.float().std() > 5


def test_the_readmes_use_of_an_export(tmp_path, monkeypatch):
    """Its noise has a row for every anchor that its frames need, and none too many: here 25,
    anchors 25 to 49.
    """
    monkeypatch.chdir(tmp_path)
    generator = networks(motion_distance=4)[0]
    config = generator.config
    export_file(generator, tmp_path / "sky.pt2")
    text = (ROOT / "mostgan" / "checkpoint" / "README.md").read_text().split("```python\n")
    (snippet,) = [code for code in text if "torch.export.load" in code]
    names = {}
    exec(snippet.partition("```")[0], names)
    noise, first_anchor = motion_noise([0], names["t"], config)
    assert names["noise"].shape == noise.shape == (1, 25, config.motion_noise_dim)
    assert names["first_anchor"] == first_anchor.item()
    expected = generator(names["z"], names["t"], names["noise"], first_anchor, psi=0.8)
    difference = names["frames"][0].int() - to_uint8(expected).int()
    assert names["frames"].shape == (1, 16, 3, 32, 32) and difference.abs().max() <= 1


@torch.no_grad()
def test_what_is_exported_renders_several_clips_with_labels():
    """Each clip has its own label in content and in motion, and is truncated to the mean w."""
    generator = networks(num_labels=3)[0]
    generator.motion_codes.conv0[:, -3:] *= 30
    program = WindowRenderer(generator)
    t = torch.tensor([[3.0, 30.5], [100.0, 77.25]], dtype=torch.float64)
    noise, first_anchor = motion_noise([8, 9], t, generator.config)
    label, z = torch.tensor([[0.0, 1, 0], [0.5, 0, -2]]), content_latent([1, 2], 10)
    frames = program(z, t, noise, first_anchor, torch.tensor(0.75), label)
    w = generator.mapping.w_avg + 0.75 * (generator.mapping(z, label) - generator.mapping.w_avg)
    motion = generator.motion(w, t, noise, first_anchor, label)
    expected, _ = generator.synthesis(generator.synthesis.content(w), *motion)
    expected = (expected * 127.5 + 128).clamp(0, 255).floor().unflatten(0, (2, 2))
    assert (frames - expected).abs().max() <= 1 and expected.std() > 5
    swapped = program(z, t, noise, first_anchor, torch.tensor(0.75), label.flip(0))
    assert (swapped.float() - frames.float()).abs().mean() > 1


@pytest.mark.slow
@pytest.mark.parametrize("order", ["content_first", "motion_first"])
@torch.no_grad()
def test_an_export_whose_styles_act_on_weights_takes_any_number_of_frames(order):
    """As the model in the package is: its layers convolve with a kernel for each frame."""
    generator = checkpoint.load(checkpoint.BUILT_IN)
    state, config = generator.state_dict(), generator.config
    generator = Generator(dataclasses.replace(config, modulation_order=order)).eval()
    generator.load_state_dict(state)
    assert not generator.config.motion_demod_only_resolutions
    program = export_window(generator).module()
    t = torch.arange(9, dtype=torch.float64)[None] * 30.5
    noise, first_anchor = motion_noise([3], t, generator.config)
    z, psi = content_latent([3], generator.config.z_dim), torch.tensor(1.0)
    for count in (1, 4, 9):
        frames = program(z, t[:, :count].contiguous(), noise, first_anchor, psi)[0]
        expected = to_uint8(generator(z, t[:, :count], noise, first_anchor))
        difference = (frames.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_export_hands_on_every_option(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "mostgan.checkpoint.export.export_file", lambda *args: asked.append(args) or "load(FILE)"
    )
    (tmp_path / "run").mkdir()
    network, out = networks()[0], tmp_path / "a.pt2"
    checkpoint.save(tmp_path / "run", 1, network.config, network.state_dict(), {}, {})
    run(commands, "export", tmp_path / "run", out, "--clips", 3)
    ((generator, *rest),) = asked
    assert rest == [out, 3] and capsys.readouterr().out == f"load({str(out)!r})"
    assert torch.equal(generator.mapping.w_avg, network.mapping.w_avg)


def test_import_hands_on_every_option(tmp_path, monkeypatch):
    asked = []

    def read(*args):
        asked.append(args)
        raise UserError("enough")

    monkeypatch.setattr(commands, "read_released", read)
    out, path = tmp_path / "out", tmp_path / "a.pkl"
    for words, expected in (
        ([], ("G_ema", False, False, None, None)),
        (["--network", "G", "--discriminator"], ("G", True, False, None, None)),
        (["--training", "--motion-distance", 64], ("G_ema", False, True, None, 64)),
        (["--half-precision", 16, 32], ("G_ema", False, False, (16, 32), None)),
    ):
        with pytest.raises(SystemExit):
            run(commands, "import", path, out, *words)
        assert asked.pop() == (path, *expected)


def test_an_import_has_each_network_in_its_own_file_on_the_disk(tmp_path, renamed):
    made, last = networks(), networks(1)[0]
    path = write(tmp_path / "snapshot.pkl", snapshot(*made, last=last))
    files = {"config.json", "provenance.json", "model.safetensors"}
    three = {"last_generator.safetensors", "discriminator.safetensors"}
    for name, words, model, more in (
        ("average", [], made[0], set()),
        ("last", ["--network", "G"], last, set()),
        ("all", ["--training"], made[0], three),
    ):
        run(commands, "import", path, tmp_path / name, *words)
        assert renamed[tmp_path / name] == files | more
        states = {"model": model, "last_generator": last, "discriminator": made[1]}
        for file, network in states.items():
            if f"{file}.safetensors" in files | more:
                found = load_file(tmp_path / name / f"{file}.safetensors")
                expected = network.state_dict()
                assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_exports_that_cannot_be(tmp_path):
    generator = networks()[0]
    for path, clips, word in (
        ("a.bin", 1, ".pt2"),
        ("no/where.pt2", 1, "not a folder"),
        ("a.pt2", 0, "--clips"),
    ):
        with pytest.raises(UserError, match=word):
            export_file(generator, tmp_path / path, clips)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.pt2").write_text("of value")
    with pytest.raises(UserError, match="there.pt2 is there already: choose another name"):
        export_file(generator, tmp_path / "there.pt2")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["of value"]


def test_show(tmp_path, canary, capsys):
    path = write(tmp_path / "snapshot.pkl", snapshot(*networks()))
    commands.import_released(path, tmp_path / "released", discriminator=True)
    capsys.readouterr()
    commands.show(tmp_path / "released")
    shown = capsys.readouterr().out
    generator = checkpoint.load(tmp_path / "released")
    for word in (
        f"{sum(p.numel() for p in generator.parameters()):,}",
        "imported_from",
        str(path),
        "half precision",
        hashlib.sha256(path.read_bytes()).hexdigest(),
        "discriminator",
        "without its training state",
    ):
        assert word in shown, word
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        '{"preset": "tiny", "dataset": "sky", "data": "clips.zip", "seed": 3}'
    )
    judge = Discriminator(generator.config)
    tensors = {f"D.{name}": tensor for name, tensor in judge.state_dict().items()}
    scalars = dict(step=12, frames=288, seconds=3.5, ada_p=0.25)
    checkpoint.save(run, 12, generator.config, generator.state_dict(), tensors, scalars)
    commands.show(run)
    shown = capsys.readouterr().out
    for word in (
        "checkpoint-000012",
        "288",
        "0.25",
        "clips.zip",
        "motion_resolutions",
        "16, 32",
        hashlib.sha256((run / "checkpoint-000012" / "model.safetensors").read_bytes()).hexdigest(),
    ):
        assert word in shown, word
    with pytest.raises(UserError, match="neither a checkpoint"):
        commands.show(tmp_path)
