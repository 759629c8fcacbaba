"""Released checkpoints of MoStGAN-V and StyleGAN-V: their networks under our names, their configuration inferred.

A released file is a pickle {'G': …, 'D': …, 'G_ema': …} of modules (spec §10), which unpickle.py reads as data. What
the configuration needs is in the shapes; the few settings that leave no trace there are in attributes of the modules.
"""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mostgan import unpickle
from mostgan.config import ModelConfig, UserError
from mostgan.discriminator import Discriminator
from mostgan.model import Generator

HALF_PRECISION_LAYERS = 4  # the release runs its four highest resolutions in half precision (spec §6)
MOST_MODULES, MOST_TENSORS, DEEPEST = 2000, 10_000, 20  # a network of the release: 130 modules, 200 tensors, 6 deep
MOST_GROUP = 2**16  # clips whose statistics the discriminator pools; usually 4
SHARED = 2**22  # numbers that tensors may have beyond those of their storages: filters that many layers share
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_COMPUTED = re.compile(r"(resample_filter|\.freqs|\.phase_scales|\.fourier_coefs)$")  # follow from the config
_RENAMED = [  # released name → ours
    (r"^mapping\.(fc\d+)", r"mapping.layers.\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.weight", r"motion_codes.conv\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.bias", r"motion_codes.conv\1_bias"),
    (r"^synthesis\.motion_encoder\.time_encoder\.periods_predictor", "motion_codes.period"),
    (r"^synthesis\.motion_encoder\.time_encoder\.phase_predictor", "motion_codes.phase"),
    (r"^synthesis\.motion_encoder\.time_encoder\.aligners_predictor", "motion_codes.aligner"),
    (r"^synthesis\.multimotionmap\.(\d)", r"motion_network.fc\1"),
    (r"^(synthesis\.b\d+\.conv\d)\.hypernet\.conv0", r"\1.hypernetwork"),
    (r"^synthesis\.b4\.input\.input\.const", "synthesis.b4.const"),
]
_RENAMED_DISCRIMINATOR = [
    (r"^mapping\.embed", "time_condition.embed"),
    (r"^mapping\.(fc\d+)", r"time_condition.layers.\1"),
    (r"^time_encoder\.const_embed", "time_condition.table"),
]
_TIME_ENCODER = "synthesis.motion_encoder.time_encoder"


def from_released_names(state: dict[str, torch.Tensor], discriminator=False) -> dict[str, torch.Tensor]:
    """A released generator's (or discriminator's) state dict under our names; load it with strict=True."""
    renamed = {}
    for name, tensor in state.items():
        if _COMPUTED.search(name):
            continue
        for pattern, ours in _RENAMED_DISCRIMINATOR if discriminator else _RENAMED:
            name = re.sub(pattern, ours, name)
        if name.endswith("hypernetwork.weight"):
            tensor = tensor.squeeze(-1).squeeze(-1)  # stored as a convolution of kernel size 1
        if name == "synthesis.b4.const":
            tensor = tensor.squeeze(0)
        renamed[name] = tensor
    return renamed


@dataclass
class Network:
    """A network as the file has it."""

    state: dict[str, torch.Tensor]
    """its tensors under released names"""
    class_name: str | None = None
    attributes: dict[str, dict] = field(default_factory=dict)
    """what else its modules store: path of the module → attributes"""


@dataclass
class Imported:
    """A released checkpoint as ours."""

    config: ModelConfig
    generator: dict[str, torch.Tensor]
    discriminator: dict[str, torch.Tensor] | None
    provenance: dict
    inferred: str
    """a line for people: what the configuration was inferred to be, and from what"""


def read_released(path: Path, network="G_ema", discriminator=False, half_precision=None, motion_distance=None):
    """Read a released pickle, a file of torch.save, or a safetensors file of released names → Imported.

    network: which generator, G_ema or G; discriminator: D as well. half_precision: the resolutions that the release
    runs so (pre-normalized, motion as demodulation factor only), where that is not as stored or usual;
    motion_distance: D of spec §2, for a file without the buffers that tell it.
    Executes nothing of the file. Raises UserError on whatever is no such checkpoint.
    """
    path = Path(path)
    networks = read_networks(path, [network] + ["D"] * discriminator)
    try:
        _check_dtypes(networks)
        config, notes = infer_config(networks[network], networks.get("D"), half_precision, motion_distance)
        generator = _fitted(networks[network].state, Generator, config)
        judge = _fitted(networks["D"].state, Discriminator, config) if discriminator else None
        _check_computed(networks, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    provenance = {"imported_from": str(path), "bytes": path.stat().st_size, "sha256": sha256(path), "network": network,
                  "class": networks[network].class_name, "discriminator": discriminator, "inferred": notes}
    return Imported(config, generator, judge, provenance, notes)


def sha256(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_networks(path: Path, names: list[str]) -> dict[str, Network]:
    """The networks of these names in a file. Raises UserError if one is missing or is no module."""
    if path.suffix == ".safetensors":
        found = _read_safetensors(path, names)
    else:
        found = unpickle.read(path)
        if isinstance(found, unpickle.Record) or _is_state(found):  # one network alone
            found = {names[0]: found}
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no networks by name (G, D, G_ema)")
    missing = [name for name in names if name not in found]
    if missing:
        held = ascii(", ".join(key[:20] for key in list(found)[:8] if type(key) is str))[1:-1]
        raise UserError(f"{path} has no {missing[0]}" + (f", only {held}" if held else ""))
    try:
        return {name: _network(found[name]) for name in names}
    except unpickle.Refused as error:
        raise UserError(f"{path} is refused, and nothing in it was executed: {error}") from None


def _read_safetensors(path, names):
    """Plain state dicts: the generator's names as they are, or those of several networks behind `G_ema.`, `D.`, …"""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    found = {name: {} for name in ("G", "D", "G_ema")}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        found.setdefault(head if head in found else names[0], {})[rest if head in found else key] = tensor
    return {name: tensors for name, tensors in found.items() if tensors}


def _is_state(value):
    return isinstance(value, dict) and bool(value) and all(isinstance(v, unpickle.Tensor) for v in value.values())


def _network(value):
    """A module's record, or a plain state dict → Network."""
    if isinstance(value, dict) and all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        return Network(value)
    if _is_state(value):
        return Network(_read_tensors(value))
    if not isinstance(value, unpickle.Record):
        raise unpickle.Refused(f"a {type(value).__name__} where a network should be")
    tensors, attributes = {}, {}
    todo = [("", value, ())]
    while todo:
        path, record, above = todo.pop()
        if id(record) in above or len(above) > DEEPEST:
            raise unpickle.Refused(f"the module {path} contains itself, or others more than {DEEPEST} deep")
        own_tensors, children = _content(path, record)
        attributes[path] = record.state
        prefix = path and path + "."
        tensors |= {prefix + key: tensor for key, tensor in own_tensors.items()}
        todo += [(prefix + key, child, (*above, id(record))) for key, child in children.items()]
        if len(attributes) + len(todo) > MOST_MODULES or len(tensors) > MOST_TENSORS:
            raise unpickle.Refused(f"a network of more than {MOST_MODULES} modules or {MOST_TENSORS} tensors")
    return Network(_read_tensors(tensors), value.name, attributes)


def _content(path, record):
    """A module's own tensors, as far as they belong to its state, and its child modules, by name."""
    state = record.state if isinstance(record, unpickle.Record) else None
    if not isinstance(state, dict):
        raise unpickle.Refused(f"{path or 'the network'} is no module")
    parts = [state.get(key) or {} for key in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, dict) and len(part) <= MOST_TENSORS for part in parts):
        raise unpickle.Refused(f"{path or 'the network'} is no module")
    if not all(type(key) is str and re.fullmatch(r"\w{1,100}", key, re.ASCII) for part in parts for key in part):
        raise unpickle.Refused(f"{path or 'the network'} has parts without a proper name")
    parameters, buffers, modules = ({k: v for k, v in part.items() if v is not None} for part in parts)
    passing = state.get("_non_persistent_buffers_set")
    if isinstance(passing, set):
        buffers = {key: tensor for key, tensor in buffers.items() if key not in passing}
    return parameters | buffers, modules


def _read_tensors(tensors):
    """Records of tensors → torch.Tensors. Raises Refused if together they are more than the storages they lie in."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, unpickle.Tensor):
            raise unpickle.Refused(f"{ascii(name)[:100]} is no tensor")
    storages = {id(tensor.storage): tensor.storage for tensor in tensors.values()}
    room = sum(storage.numel for storage in storages.values()) + SHARED
    read = {}
    for name, tensor in tensors.items():
        read[name] = tensor.read()
        room -= read[name].numel()
        if room < 0:
            raise unpickle.Refused("its tensors overlap, and are together far more than the file holds")
    return read


def infer_config(generator, discriminator=None, half_precision=None, motion_distance=None):
    """Networks → ModelConfig, and a line on what was inferred. Arguments as in `read_released`. Raises UserError."""
    of = _Shapes(from_released_names(generator.state), "generator")
    blocks = (re.fullmatch(r"synthesis\.b(\d{1,4})\.torgb\.bias", name) for name in of.shapes)
    resolutions = sorted(int(block[1]) for block in blocks if block)
    channels = {r: of(f"synthesis.b{r}.conv1.weight", 4)[0] for r in resolutions}
    if not resolutions:
        raise UserError("it has no synthesis blocks: this is no generator of MoStGAN-V or StyleGAN-V")
    w_dim, fc0 = of("mapping.layers.fc0.weight", 2)
    labels = of("mapping.embed.weight", 2)[1] if "mapping.embed.weight" in of.shapes else 0
    values = dict(
        resolution=resolutions[-1], w_dim=w_dim, z_dim=fc0 - (w_dim if labels else 0), num_labels=labels,
        channel_max=max(channels.values()), channel_base=max(r * c for r, c in channels.items()),
        mapping_layers=sum(re.fullmatch(r"mapping\.layers\.fc\d+\.weight", name) is not None for name in of.shapes),
        motion_noise_dim=of("motion_codes.conv0", 3)[0], motion_code_dim=of("motion_codes.aligner.weight", 2)[0],
        num_frequencies=of("motion_codes.period.weight", 2)[0], **_periods(generator.state, motion_distance),
        motion_styles=0, motion_resolutions=(),
    )  # fmt: skip
    if "motion_network.fc0.weight" in of.shapes:
        values |= _motion_styles(of, resolutions, w_dim)
    if half_precision is not None and not set(half_precision) <= set(resolutions):
        raise UserError(f"half_precision is {tuple(half_precision)}, but its resolutions are {tuple(resolutions)}")
    halves, how = _half_precision(generator, resolutions) if half_precision is None else (half_precision, "as given")
    values["prenorm_resolutions"] = tuple(halves)
    values["motion_demod_only_resolutions"] = tuple(r for r in halves if r in values["motion_resolutions"])
    if discriminator is not None:
        values |= _discriminator_values(discriminator, values)
    config = ModelConfig(**values)
    return config, _describe(config, how, discriminator is not None)


class _Shapes:
    """Shapes of a state dict, with a plain word on what is missing."""

    def __init__(self, state, what):
        self.shapes, self.what = {name: tuple(tensor.shape) for name, tensor in state.items()}, what

    def __call__(self, name, dims):
        if len(self.shapes.get(name, ())) != dims or 0 in self.shapes[name]:
            raise UserError(f"it has no {name} of {dims} dimensions: this is no {self.what} of MoStGAN-V or StyleGAN-V")
        return self.shapes[name]


def _periods(state, motion_distance):
    """motion_distance and max_period, from the frequencies ω = 2π / period, longest period first (spec §2)."""
    if f"{_TIME_ENCODER}.freqs" not in state:
        if motion_distance is None:
            raise UserError(f"it has no {_TIME_ENCODER}.freqs to tell the motion distance: give --motion-distance")
        return dict(motion_distance=motion_distance)
    freqs = state[f"{_TIME_ENCODER}.freqs"].double().flatten()
    if not len(freqs) or not ((freqs > 1e-6) & (freqs < 7)).all():
        raise UserError(f"its {_TIME_ENCODER}.freqs are no frequencies")
    longest, shortest = (round(2 * math.pi / float(freqs[i])) for i in (0, -1))
    return dict(motion_distance=shortest if motion_distance is None else motion_distance, max_period=longest)


def _motion_styles(of, resolutions, w_dim):
    """K, motion vectors, rank and where they act: of a MoStGAN-V generator."""
    styles = of("motion_network.fc0.weight", 2)[0] // w_dim
    name = "synthesis.b{}.conv1.hypernetwork.weight"
    motion = tuple(r for r in resolutions if name.format(r) in of.shapes)
    if not motion or not styles:
        raise UserError("it has a motion network but no layers with motion styles")
    in_channels = of(f"synthesis.b{motion[0]}.conv1.weight", 4)[1]
    return dict(
        motion_styles=styles, motion_vector_dim=of("motion_network.fc1.weight", 2)[0] // styles,
        rank=of(name.format(motion[0]), 2)[0] // (in_channels + 3 + 3), motion_resolutions=motion,
    )  # fmt: skip


def _half_precision(generator, resolutions):
    """The resolutions that the release runs in half precision, and how we know."""
    stored = {r: generator.attributes.get(f"synthesis.b{r}", {}).get("use_fp16") for r in resolutions}
    if any(type(value) is bool for value in stored.values()):
        return [r for r in resolutions if stored[r] is True], "as its blocks store"
    return resolutions[-HALF_PRECISION_LAYERS:], "assumed: the four highest"


def _discriminator_values(network, values):
    """Configuration that only the discriminator shows (spec §7)."""
    of = _Shapes(from_released_names(network.state, discriminator=True), "discriminator")
    rows, width = of("time_condition.table.weight", 2)
    per_difference = width + 2 * int(math.log2(rows))
    frames = (of("time_condition.embed.weight", 2)[1] - values["num_labels"]) // per_difference + 1
    found = dict(max_num_frames=rows, frames_per_clip=frames, discriminator_hidden_dim=of("b4.fc.weight", 2)[0])
    r = values["resolution"]
    while r > 8:  # the block that takes all images of a clip has as many times more input channels
        images, rest = divmod(of(f"b{r // 2}.conv0.weight", 4)[1], of(f"b{r}.conv1.weight", 4)[0])
        r //= 2
        if images > 1 and not rest:
            found |= dict(concat_resolution=r, motion_difference=images == 2 * frames)
    groups = [state["group_size"] for state in network.attributes.values() if "group_size" in state]
    if not all(type(group) is int and 0 < group <= MOST_GROUP for group in groups):
        raise UserError(f"its discriminator has a group_size that is no whole number from 1 to {MOST_GROUP:,}")
    return found | dict(mbstd_group=groups[0]) if groups else found


def _describe(config, how, discriminator):
    """The configuration in a line."""
    def several(resolutions):
        return ", ".join(str(r) for r in resolutions) or "none"

    styles = "no motion styles (StyleGAN-V)"
    if config.motion_styles:
        styles = (f"K = {config.motion_styles} motion styles of rank {config.rank}, motion vectors of "
                  f"{config.motion_vector_dim}, at {several(config.motion_resolutions)}")
    judge = (f"; discriminator of {config.frames_per_clip} frames with{'' if config.motion_difference else 'out'} "
             f"differences, FC {config.discriminator_hidden_dim}, groups of {config.mbstd_group}")
    return (f"{config.resolution}², at most {config.channel_max} channels; w of {config.w_dim}, "
            f"{config.num_labels or 'no'} labels; motion distance {config.motion_distance}, longest period "
            f"{config.max_period}; {styles}; half precision in the release at {several(config.prenorm_resolutions)} "
            f"({how}), so pre-normalized there, and motion as the demodulation factor only at "
            f"{several(config.motion_demod_only_resolutions)}{judge if discriminator else ''}")


def _fitted(state, network, config):
    """The state under our names, float32, for network(config); UserError if they are not for each other."""
    state = from_released_names(state, discriminator=network is Discriminator)
    what = network.__name__.lower()
    try:
        with torch.device("meta"):  # shapes without memory
            expected = {name: tuple(tensor.shape) for name, tensor in network(config).state_dict().items()}
    except RuntimeError:  # a size beyond 2⁶³
        raise UserError(f"its {what} has shapes that do not fit each other") from None
    for name in sorted(expected.keys() | state.keys()):
        if name not in expected:
            raise UserError(f"its {what} has {ascii(name)[1:-1][:100]}, which ours has not: another architecture")
        if name not in state:
            raise UserError(f"its {what} has no {name}")
        if tuple(state[name].shape) != expected[name]:
            raise UserError(f"its {what} has {name} of shape {tuple(state[name].shape)}, but the rest of it goes with "
                            f"{expected[name]}")
        if not state[name].float().isfinite().all():
            raise UserError(f"its {what} has {name} with numbers that are not finite in float32")
    return {name: state[name].float().contiguous() for name in expected}


def _check_dtypes(networks):
    """Numbers of plain floating point alone: others (float8, complex, integers) are no weights of the release, and
    PyTorch computes with some of them in part only."""
    for which, network in networks.items():
        for name, tensor in network.state.items():
            if tensor.dtype not in WEIGHT_DTYPES:
                raise UserError(f"its {which} has {ascii(name)[1:-1][:100]} of {tensor.dtype}, but weights are "
                                "float16, bfloat16, float32 or float64")


def _check_computed(networks, config):
    """What we compute and the release stores must be the same: FIR filters (spec §1) and frequencies (§2, §7)."""
    taps, M = torch.tensor([1.0, 3, 3, 1]), config.max_num_frames
    longest, shortest = math.log2(config.max_period), math.log2(config.motion_distance)
    period = torch.exp2(torch.linspace(longest, shortest, config.num_frequencies, dtype=torch.float64))
    octaves = torch.arange(int(math.log2(M)), dtype=torch.float64)
    expected = {
        "resample_filter": torch.outer(taps, taps) / 64, "freqs": 2 * math.pi / period,
        "phase_scales": config.max_period / period, "fourier_coefs": math.pi * torch.exp2(octaves) / M,
    }  # fmt: skip
    for network in networks.values():
        for name, tensor in network.state.items():
            computed = expected.get(name.rpartition(".")[2]) if _COMPUTED.search(name) else None
            if computed is None:
                continue
            tensor = tensor.double().squeeze(0)
            if tensor.shape != computed.shape or not torch.allclose(tensor, computed.double(), rtol=1e-4):
                raise UserError(f"its {ascii(name)[1:-1][:100]} is not what this configuration computes")
