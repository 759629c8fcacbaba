"""Released checkpoints of MoStGAN-V and StyleGAN-V: their networks under our names, and their
configuration.

A released file is a pickle {'G': …, 'D': …, 'G_ema': …} of modules (spec §10), which pickles.py
reads as data. The configuration is pickled with them. What it tells is compared with what the
tensors show, and the two must agree; what only the tensors show, as in a plain state dict, is
inferred, and said to be.
"""

import hashlib
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mostgan.checkpoint import pickles
from mostgan.checkpoint.pickles import Inert, Refused, shown
from mostgan.config import ModelConfig, UserError
from mostgan.discriminator import Discriminator
from mostgan.model import Generator
from mostgan.motion import content_latent

HALF_PRECISION_LAYERS = (
    4  # the release runs its four highest resolutions in half precision (spec §6)
)
MOST_MODULES, MOST_TENSORS, DEEPEST = (
    2000,
    10_000,
    20,
)  # a network of the release: 130 modules, 200 tensors, 6 deep
MOST_REFERENCES = 100  # to be followed for one value of a configuration
USUAL_FPS = 25.0  # of data sets, where a file does not tell
MOST_GROUP = 2**16  # clips whose statistics the discriminator pools; usually 4
MOST_CLASSES, CLASS_LATENTS, CLASS_SEED = 4096, 1000, 2**40  # for the mean w of each class
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_COMPUTED = re.compile(
    r"(resample_filter|\.freqs|\.phase_scales|\.fourier_coefs)$"
)  # follow from the configuration
_RENAMED = [  # released name → ours
    (r"^mapping\.(fc\d+)", r"mapping.layers.\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.weight", r"motion_codes.conv\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.bias", r"motion_codes.conv\1_bias"),
    (r"^synthesis\.motion_encoder\.time_encoder\.periods_predictor", "motion_codes.period"),
    (r"^synthesis\.motion_encoder\.time_encoder\.phase_predictor", "motion_codes.phase"),
    (r"^synthesis\.motion_encoder\.time_encoder\.aligners_predictor", "motion_codes.aligner"),
    (r"^synthesis\.multimotionmap\.(\d)", r"motion_network.fc\1"),
    (
        r"^(synthesis\.b\d+\.conv\d)\.hypernet(\.conv0)?\.",
        r"\1.hypernetwork.",
    ),  # without conv0: files of late 2022
    (r"^synthesis\.b4\.input\.input\.const", "synthesis.b4.const"),
]
_RENAMED_DISCRIMINATOR = [
    (r"^mapping\.embed", "time_condition.embed"),
    (r"^mapping\.(fc\d+)", r"time_condition.layers.\1"),
    (r"^time_encoder\.const_embed", "time_condition.table"),
]
_FREQUENCIES = "synthesis.motion_encoder.time_encoder.freqs"

# Where the pickled configuration of a generator, and of a discriminator, tells a field of
# ModelConfig.
_TOLD_BY_GENERATOR = (
    ("motion_distance", "motion.motion_z_distance"),
    ("shortest_period", "time_enc.min_period_len"),
    ("max_period", "time_enc.max_period_len"),
    ("num_frequencies", "time_enc.dim"),
    ("shortest_period", "motion.time_enc.min_period_len"),
    ("max_period", "motion.time_enc.max_period_len"),
    ("num_frequencies", "motion.time_enc.dim"),
    ("motion_noise_dim", "motion.z_dim"),
    ("w_dim", "w_dim"),
    ("z_dim", "z_dim"),
    ("num_labels", "c_dim"),
    ("motion_styles", "motion_num"),
    ("motion_vector_dim", "motion_dim"),
    ("motion_resolutions", "mod_layers"),
    ("rank", "rank"),
    ("max_num_frames", "sampling.max_num_frames"),
    ("frames_per_clip", "sampling.num_frames_per_video"),
    ("fps", "sampling.fps"),
)
_TOLD_BY_DISCRIMINATOR = (
    ("max_num_frames", "sampling.max_num_frames"),
    ("frames_per_clip", "sampling.num_frames_per_video"),
    ("concat_resolution", "concat_res"),
    ("motion_difference", "motion_diff"),
    ("discriminator_hidden_dim", "motion_dim"),
    ("mbstd_group", "mbstd_group_size"),
    ("time_condition", "dummy_c"),
)
# The whole run's configuration has the discriminator's, too: so a generator alone tells what a new
# one should be.
_TOLD_BY_GENERATOR += tuple(
    (name, f"model.discriminator.{path}") for name, path in _TOLD_BY_DISCRIMINATOR
)
# A file of StyleGAN-V may have settings of what MoStGAN-V added, which then mean nothing.
_OF_MOSTGAN_V = {"motion_styles", "motion_vector_dim", "motion_resolutions", "rank"}
_OF_MOSTGAN_V |= {"motion_difference", "discriminator_hidden_dim"}
_CLAMPED = (
    "conv0",
    "conv1",
    "torgb",
    "fromrgb",
    "conv",
)  # layers whose conv_clamp bounds activations
# Options of the release that ours has in one way only: in the pickled configuration, and as
# attributes of modules.
_ONE_WAY = {
    "motion.gen_strategy": "conv",
    "motion.kernel_size": 11,
    "motion.fourier": True,
    "motion.use_fractional_t": True,
    "input.type": "temporal",
    "time_enc.cond_type": "concat_const",
    "use_noise": False,
    "num_frames_div_factor": 2,
    "spectral_norm": False,
    "softmask": False,
}
_ONE_WAY_ATTRIBUTES = {
    "instance_norm": (False,),
    "spectral_norm": (False,),
    "use_noise": (False,),
    "img_channels": (3,),
    "architecture": ("skip", "resnet"),
    "skip_small_t_freqs": (0,),
}


def from_released_names(
    state: dict[str, torch.Tensor], discriminator=False
) -> dict[str, torch.Tensor]:
    """A released generator's (or discriminator's) state dict under our names; load it with
    strict=True.
    """
    renamed = {}
    for name, tensor in state.items():
        if _COMPUTED.search(name):
            continue
        for pattern, ours in _RENAMED_DISCRIMINATOR if discriminator else _RENAMED:
            name = re.sub(pattern, ours, name)
        if name.endswith("hypernetwork.weight") and tensor.ndim == 4:
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

    @property
    def cfg(self):
        """The pickled configuration, or None."""
        return self.attributes.get("", {}).get("cfg")


@dataclass
class Imported:
    """A released checkpoint as ours."""

    config: ModelConfig
    networks: dict[str, dict[str, torch.Tensor]]
    """G_ema, G or D → its state under our names"""
    class_means: torch.Tensor | None
    """the mean w of each class [num_labels, w_dim], if labels are classes"""
    provenance: dict
    notes: str
    """a line for people: the configuration, and what of it was inferred from what"""


def read_released(
    path,
    network="G_ema",
    discriminator=False,
    training=False,
    half_precision=None,
    motion_distance=None,
):
    """Read a released pickle, a file of torch.save, or a safetensors file of released names →
    Imported.

    network: which generator, G_ema or G; discriminator: D as well; training: G, D and G_ema.
    half_precision: the resolutions that the release runs so (pre-normalized, motion as demodulation
    factor only), where that is not as stored; motion_distance: D of spec §2, for a file that does
    not tell. Executes nothing of the file. Raises UserError on whatever is no such checkpoint.
    """
    path = Path(path)
    names = ["G_ema", "G", "D"] if training else [network] + ["D"] * discriminator
    networks, classes = read_networks(path, names)
    try:
        _check_dtypes(networks)
        _check_options(networks)
        config, notes = find_config(
            networks[names[0]], networks.get("D"), half_precision, motion_distance
        )
        fitted = {
            name: _fitted(of, Discriminator if name == "D" else Generator, config)
            for name, of in networks.items()
        }
        _check_computed(networks, config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ArithmeticError, ValueError, TypeError) as error:  # numbers that are out of all bounds
        raise UserError(f"{path}: its configuration makes no sense: {shown(error)}") from None
    means = None
    if classes and 0 < config.num_labels <= MOST_CLASSES:
        means = class_means(fitted[names[0]], config)
    provenance = {
        "imported_from": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "network": names[0],
        "class": networks[names[0]].class_name,
        "with": names[1:],
        "configuration": notes,
    }
    return Imported(config, fitted, means, provenance, notes)


def sha256(path):
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@torch.no_grad()
def class_means(state, config):
    """The mean w of each class over 1,000 latents, the same for all classes: float32 [num_labels,
    w_dim].
    """
    with torch.device("meta"):
        mapping = Generator(config).mapping
    of_mapping = {
        name.removeprefix("mapping."): value
        for name, value in state.items()
        if name.startswith("mapping.")
    }
    mapping.load_state_dict(of_mapping, assign=True)
    z = content_latent(range(CLASS_SEED, CLASS_SEED + CLASS_LATENTS), config.z_dim)
    one_hot = torch.eye(config.num_labels)
    return torch.stack([mapping(z, label.expand(len(z), -1)).mean(dim=0) for label in one_hot])


# --------------------------------------------------------------------------- the networks of a file


def read_networks(path, names):
    """({name: Network}, whether labels may be classes). Raises UserError if a network is missing or
    is none.
    """
    if path.suffix == ".safetensors":
        found = _read_safetensors(path, names)
        return {name: Network(found[name]) for name in _present(path, found, names)}, True
    with pickles.opened(path) as found:
        if isinstance(found, Inert) or _is_state(found):  # one network alone
            found = {names[0]: found}
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no networks by name (G, D, G_ema)")
        networks = {name: _network(found[name]) for name in _present(path, found, names)}
        return networks, _are_classes(found.get("vis"))


def _present(path, found, names):
    missing = [name for name in names if name not in found]
    if missing:
        held = ascii(", ".join(key[:20] for key in list(found)[:8] if type(key) is str))[1:-1]
        raise UserError(f"{path} has no {missing[0]}" + (f", only {held}" if held else ""))
    return names


def _are_classes(vis):
    """Whether the labels of the sample grids are one-hot, as far as the file has any."""
    grids = vis.get("grid_c") if isinstance(vis, dict) else None
    grids = grids[:100] if isinstance(grids, tuple | list) else ()
    tensors = {str(i): grid for i, grid in enumerate(grids) if isinstance(grid, pickles.Tensor)}
    for labels in pickles.read_tensors(tensors).values():
        one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(-1) == 1).all()
        if labels.numel() and not one_hot:
            return False
    return True


def _read_safetensors(path, names):
    """Plain state dicts: the generator's names as they are, or those of several networks behind
    `G_ema.`, `D.`, …
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    found = {name: {} for name in ("G", "D", "G_ema")}
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        name, key = (head, rest) if head in found else (names[0], key)
        found[name][key] = tensor
    return {name: tensors for name, tensors in found.items() if tensors}


def _is_state(value):
    tensors = value.values() if isinstance(value, dict) else ()
    return bool(tensors) and all(isinstance(tensor, pickles.Tensor) for tensor in tensors)


def _network(value):
    """A module, or a plain state dict, of a pickle → Network. Raises Refused."""
    if _is_state(value):
        return Network(pickles.read_tensors({str(name): tensor for name, tensor in value.items()}))
    if not isinstance(value, Inert):
        raise Refused(f"a {type(value).__name__} where a network should be")
    tensors, attributes = {}, {}
    todo = [("", value, ())]
    while todo:
        path, module, above = todo.pop()
        if id(module) in above or len(above) > DEEPEST:
            raise Refused(f"the module {path} contains itself, or others more than {DEEPEST} deep")
        own_tensors, children = _content(path, module)
        attributes[path] = module.state
        prefix = path and path + "."
        tensors |= {prefix + key: tensor for key, tensor in own_tensors.items()}
        todo += [(prefix + key, child, (*above, id(module))) for key, child in children.items()]
        if len(attributes) + len(todo) > MOST_MODULES or len(tensors) > MOST_TENSORS:
            raise Refused(
                f"a network of more than {MOST_MODULES} modules or {MOST_TENSORS} tensors"
            )
    return Network(pickles.read_tensors(tensors), value.name, attributes)


def _content(path, module):
    """A module's own tensors, as far as they belong to its state, and its child modules, by
    name.
    """
    state = module.state if isinstance(module, Inert) else None
    if not isinstance(state, dict):
        raise Refused(f"{path or 'the network'} is no module")
    parts = [state.get(key) or {} for key in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, dict) and len(part) <= MOST_TENSORS for part in parts):
        raise Refused(f"{path or 'the network'} is no module")
    if not all(
        type(key) is str and re.fullmatch(r"\w{1,100}", key, re.ASCII)
        for part in parts
        for key in part
    ):
        raise Refused(f"{path or 'the network'} has parts without a proper name")
    parameters, buffers, modules = (
        {k: v for k, v in part.items() if v is not None} for part in parts
    )
    passing = state.get("_non_persistent_buffers_set")
    if isinstance(passing, set):
        buffers = {key: tensor for key, tensor in buffers.items() if key not in passing}
    tensors = parameters | buffers
    for key, tensor in tensors.items():
        if not isinstance(tensor, pickles.Tensor):
            raise Refused(f"{path}.{key} is no tensor")
    return tensors, modules


# --------------------------------------------------------------------- the pickled configuration


_MISSING = object()


def look_up(cfg, path):
    """The value at a dotted path of a pickled configuration, references followed; _MISSING if there
    is none.

    Nodes are omegaconf's: `_content` of dictionaries and lists, `_val` of leaves. A text `${a.b}`
    stands for what is at a.b, counted from the root of all that cfg is a part of; so are paths that
    begin with `model`. Raises UserError on references that lead nowhere.
    """
    root = _root(cfg)
    node = root if path.startswith("model.") else cfg
    looking = _Lookup(root, path)
    value = looking.walk(node, path.split("."))
    if isinstance(value, list):
        return [looking.resolved(item) for item in value]
    return _plain(value)


def _root(node):
    seen = set()
    while isinstance(node, Inert) and id(node) not in seen:
        seen.add(id(node))
        parent = node.state.get("_parent") if isinstance(node.state, dict) else None
        if not isinstance(parent, Inert):
            break
        node = parent
    return node


class _Lookup:
    """One look into a configuration, with the references that are being followed, and how many may
    be.
    """

    def __init__(self, root, path):
        self.root, self.path, self.following, self.left = root, path, [], MOST_REFERENCES

    def walk(self, node, keys):
        node = self.resolved(node)
        for key in keys:
            if not isinstance(node, dict) or key not in node:
                return _MISSING
            node = self.resolved(node[key])
        return node

    def resolved(self, node):
        """A node's content: a dictionary or list of nodes, or a plain value."""
        for _ in range(DEEPEST):
            if not isinstance(node, Inert):
                break
            state = _dictionary(node.state)
            node = state["_val"] if "_val" in state else state.get("_content")
        reference = re.fullmatch(r"\$\{([\w.]{1,200})\}", node) if type(node) is str else None
        if reference is None:
            return node
        self.left -= 1
        if node in self.following or not self.left:
            raise UserError(f"its configuration's {self.path} refers to itself, by {shown(node)}")
        self.following.append(node)
        found = self.walk(self.root, reference[1].split("."))
        self.following.pop()
        if found is _MISSING:
            where = f"{shown(node)}, which is not there"
            raise UserError(f"its configuration's {self.path} refers to {where}")
        return found


def _plain(value):
    return value if type(value) in (str, int, float, bool) else _MISSING


# -------------------------------------------------------------------------------- the configuration


class Evidence:
    """What the configuration tells of each field, and what the tensors show: both must agree."""

    def __init__(self):
        self.told, self.shown = {}, {}

    def tell(self, name, value, where):
        """The file states a value of a field. None as a value is a statement, too."""
        if name in self.told and not _same(self.told[name][0], value):
            before, place = self.told[name]
            raise UserError(
                f"its {name} is {_said(before)} in {place}, but {_said(value)} in {where}"
            )
        self.told.setdefault(name, (value, where))

    def show(self, name, value, where):
        self.shown[name] = (value, where)

    def agreed(self):
        """({field: value}, names of the fields that only the tensors show). Raises UserError where
        they disagree.
        """
        for name in self.told.keys() & self.shown.keys():
            (told, place), (by_tensors, where) = self.told[name], self.shown[name]
            if not _same(told, by_tensors):
                raise UserError(
                    f"its {name} is {_said(told)} by {place}, but {_said(by_tensors)} by {where}"
                )
        values = {name: value for name, (value, _) in (self.shown | self.told).items()}
        return values, sorted(self.shown.keys() - self.told.keys())


def _same(a, b):
    numbers = all(type(value) in (int, float) for value in (a, b))
    return math.isclose(a, b, rel_tol=1e-4) if numbers else a == b


def _said(value):
    return shown(", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value))


def find_config(generator, discriminator=None, half_precision=None, motion_distance=None):
    """Networks → ModelConfig, and a line about it. Arguments as in `read_released`. Raises
    UserError.
    """
    evidence = Evidence()
    resolutions = _show_generator(evidence, generator.state)
    _tell(evidence, generator, _TOLD_BY_GENERATOR, resolutions)
    if discriminator is not None:
        _show_discriminator(evidence, discriminator.state)
        _tell(evidence, discriminator, _TOLD_BY_DISCRIMINATOR, resolutions)
    if motion_distance is not None:
        evidence.tell("motion_distance", motion_distance, "--motion-distance")
    if "motion_distance" not in evidence.told:
        if "shortest_period" not in evidence.shown:
            raise UserError(
                f"it has no {_FREQUENCIES} to tell the motion distance: give --motion-distance"
            )
        evidence.show(
            "motion_distance", evidence.shown["shortest_period"][0], "the shortest period"
        )
    if "fps" not in evidence.told:
        evidence.show("fps", USUAL_FPS, "most data sets")
    values, inferred = evidence.agreed()
    _channels(values, generator, resolutions)
    values.pop("stored_channels")
    if values.get("shortest_period") == values["motion_distance"]:
        del values["shortest_period"]
    if half_precision is not None and not set(half_precision) <= set(resolutions):
        raise UserError(
            f"half_precision is {tuple(half_precision)}, but its resolutions are "
            f"{tuple(resolutions)}"
        )
    halves, how = (
        _half_precision(generator, resolutions)
        if half_precision is None
        else (half_precision, "as given")
    )
    values["prenorm_resolutions"] = tuple(halves)
    values["motion_demod_only_resolutions"] = tuple(
        r for r in halves if r in values["motion_resolutions"]
    )
    config = ModelConfig(**values)
    return config, _describe(config, how, inferred)


class _Shapes:
    """Shapes of a state dict, with a plain word on what is missing."""

    def __init__(self, state, what):
        self.shapes, self.what = {name: tuple(tensor.shape) for name, tensor in state.items()}, what

    def __call__(self, name, dims):
        if len(self.shapes.get(name, ())) != dims or 0 in self.shapes[name]:
            raise UserError(
                f"it has no {name} of {dims} dimensions: this is no {self.what} of MoStGAN-V or "
                "StyleGAN-V"
            )
        return self.shapes[name]


def _show_generator(evidence, state):
    """What the generator's tensors show (spec §2 to §6). Returns its resolutions."""
    of = _Shapes(from_released_names(state), "generator")
    blocks = (re.fullmatch(r"synthesis\.b(\d{1,4})\.torgb\.bias", name) for name in of.shapes)
    resolutions = sorted(int(block[1]) for block in blocks if block)
    if not resolutions:
        raise UserError(
            "it has no synthesis blocks: this is no generator of MoStGAN-V or StyleGAN-V"
        )
    w_dim, fc0 = of("mapping.layers.fc0.weight", 2)
    labels = of("mapping.embed.weight", 2)[1] if "mapping.embed.weight" in of.shapes else 0
    layers = sum(
        re.fullmatch(r"mapping\.layers\.fc\d+\.weight", name) is not None for name in of.shapes
    )
    channels = {r: of(f"synthesis.b{r}.conv1.weight", 4)[0] for r in resolutions}
    values = dict(
        resolution=resolutions[-1],
        w_dim=w_dim,
        z_dim=fc0 - (w_dim if labels else 0),
        num_labels=labels,
        mapping_layers=layers,
        motion_noise_dim=of("motion_codes.conv0", 3)[0],
        motion_code_dim=of("motion_codes.aligner.weight", 2)[0],
        num_frequencies=of("motion_codes.period.weight", 2)[0],
        stored_channels=channels,
    )
    values |= _motion_styles(of, resolutions, w_dim)
    if _FREQUENCIES in state:
        values |= _periods(state[_FREQUENCIES].double().flatten())
    for name, value in values.items():
        evidence.show(
            name, value, "its frequencies" if "period" in name else "the shapes of its tensors"
        )
    return resolutions


def _periods(freqs):
    """Shortest and longest period, from the frequencies ω = 2π / period, longest period first (spec
    §2).
    """
    if not len(freqs) or not ((freqs > 1e-6) & (freqs < 7)).all():
        raise UserError(f"its {_FREQUENCIES} are no frequencies")
    longest, shortest = (round(2 * math.pi / float(freqs[i]), 3) for i in (0, -1))
    near = {
        period: round(period) if math.isclose(period, round(period), rel_tol=1e-4) else period
        for period in (longest, shortest)
    }
    return dict(shortest_period=near[shortest], max_period=near[longest])


def _motion_styles(of, resolutions, w_dim):
    """K, motion vectors, rank and where they act: of a MoStGAN-V generator; K = 0 of
    StyleGAN-V's.
    """
    name = "synthesis.b{}.conv1.hypernetwork.weight"
    motion = tuple(r for r in resolutions if name.format(r) in of.shapes)
    if "motion_network.fc0.weight" not in of.shapes:
        return dict(motion_styles=0, motion_resolutions=())
    styles = of("motion_network.fc0.weight", 2)[0] // w_dim
    if not motion or not styles:
        raise UserError("it has a motion network but no layers with motion styles")
    in_channels = of(f"synthesis.b{motion[0]}.conv1.weight", 4)[1]
    affine = f"synthesis.b{motion[0]}.conv1.hypernetwork.bias" in of.shapes
    return dict(
        motion_styles=styles,
        motion_vector_dim=of("motion_network.fc1.weight", 2)[0] // styles,
        rank=of(name.format(motion[0]), 2)[0] // (in_channels + 3 + 3),
        motion_resolutions=motion,
        hypernetwork="affine" if affine else "lrelu",
    )


def _tell(evidence, network, told, resolutions):
    """What a network's pickled configuration, and its modules' attributes, tell of each field."""
    for name, path in told:
        value = look_up(network.cfg, path)
        if value is _MISSING or not evidence.shown["motion_styles"][0] and name in _OF_MOSTGAN_V:
            continue
        if name == "motion_resolutions":
            numbers = re.findall(r"\d+", str(value))
            value = tuple(r for r in resolutions if str(r) in numbers)
        elif name in ("motion_difference", "time_condition"):
            value = bool(value) != path.endswith("dummy_c")
        else:
            value = _number(value, path)
        evidence.tell(name, value, f"its configuration's {path}")
    for path, attributes in network.attributes.items():
        place = f"{network.class_name}.{path}".rstrip(".")
        if not path:
            _tell_of_whole(evidence, attributes, place)
        if (
            path.rpartition(".")[2] in _CLAMPED
            and ".hypernet" not in path
            and "conv_clamp" in attributes
        ):
            clamp = attributes["conv_clamp"]
            if clamp is not None and (type(clamp) not in (int, float) or not 0 < clamp < math.inf):
                raise UserError(f"the conv_clamp of its {place} is no positive number")
            evidence.tell("activation_clamp", clamp, f"conv_clamp of {place}")
        if "group_size" in attributes:
            group = attributes["group_size"]
            if type(group) is not int or not 0 < group <= MOST_GROUP:
                number = f"whole number from 1 to {MOST_GROUP:,}"
                raise UserError(f"its discriminator has a group_size that is no {number}")
            evidence.tell("mbstd_group", group, f"{place}.group_size")


def _tell_of_whole(evidence, attributes, place):
    """What the attributes and arguments of a whole network tell."""
    mapping = _dictionary(_dictionary(attributes.get("_init_kwargs")).get("mapping_kwargs"))
    for name, value in (
        ("resolution", attributes.get("img_resolution")),
        ("num_labels", attributes.get("c_dim")),
        ("mapping_layers", mapping.get("num_layers")),
    ):
        if type(value) is int:
            evidence.tell(name, value, f"the attributes of {place}")


def _dictionary(value):
    return value if isinstance(value, dict) else {}


def _number(value, path):
    if type(value) not in (int, float) or not math.isfinite(value):
        raise UserError(f"its configuration's {path} is {_said(value)}, but must be a number")
    return int(value) if value == int(value) else value


def _show_discriminator(evidence, state):
    """What only the discriminator's tensors show (spec §7)."""
    of = _Shapes(from_released_names(state, discriminator=True), "discriminator")
    rows, width = of("time_condition.table.weight", 2)
    per_difference = width + 2 * int(math.log2(rows))
    frames = (
        of("time_condition.embed.weight", 2)[1] - evidence.shown["num_labels"][0]
    ) // per_difference + 1
    values = dict(
        max_num_frames=rows,
        frames_per_clip=frames,
        discriminator_hidden_dim=of("b4.fc.weight", 2)[0],
    )
    r = evidence.shown["resolution"][0]
    while r > 8:  # the block that takes all images of a clip has as many times more input channels
        images, rest = divmod(of(f"b{r // 2}.conv0.weight", 4)[1], of(f"b{r}.conv1.weight", 4)[0])
        r //= 2
        if images > 1 and not rest:
            values |= dict(concat_resolution=r, motion_difference=images == 2 * frames)
    for name, value in values.items():
        evidence.show(name, value, "the shapes of the discriminator's tensors")


def _channels(values, generator, resolutions):
    """channel_base and channel_max, of which tensors show only what they come to."""
    stored = values["stored_channels"]
    kwargs = _dictionary(
        _dictionary(generator.attributes.get("", {}).get("_init_kwargs")).get("synthesis_kwargs")
    )
    told = [kwargs.get(name) for name in ("channel_base", "channel_max")]
    if any(type(value) is not int or value < 1 for value in told):
        told = max(r * c for r, c in stored.items()), max(stored.values())
    values["channel_base"], values["channel_max"] = told
    for r in resolutions:
        if stored[r] != min(told[0] // r, told[1]):
            raise UserError(
                f"its channel_base {told[0]} and channel_max {told[1]} give "
                f"{min(told[0] // r, told[1])} "
                f"channels at {r}, but its tensors have {stored[r]}"
            )


def _half_precision(generator, resolutions):
    """The resolutions that the release runs in half precision, and how we know."""
    stored = {
        r: generator.attributes.get(f"synthesis.b{r}", {}).get("use_fp16") for r in resolutions
    }
    if any(type(value) is bool for value in stored.values()):
        return [r for r in resolutions if stored[r] is True], "as its blocks store it"
    highest = [r for r in resolutions[-HALF_PRECISION_LAYERS:] if r > 4]
    return highest, "assumed: the four highest, but never 4"


def _describe(config, how, inferred):
    """The configuration in a line, and where it comes from."""
    values = ", ".join(f"{name} {_said(value)}" for name, value in asdict(config).items())
    by_tensors = ", ".join(name for name in inferred if name != "stored_channels") or "nothing"
    half = f"half precision in the release: {how}"
    return f"{values}; {half}; inferred from the tensors alone: {by_tensors}"


# ------------------------------------------------------------------------------------------ checks


def _check_options(networks):
    """Raise UserError, with the option's name, on what the release can do and ours cannot."""
    for which, network in networks.items():
        for path, ours in _ONE_WAY.items():
            _refuse_other(f"{which} has {path}", look_up(network.cfg, path), (ours,))
        for path, attributes in network.attributes.items():
            place = f"{which}.{path}".rstrip(".")
            for name, ours in _ONE_WAY_ATTRIBUTES.items():
                _refuse_other(f"{place} has {name}", _plain(attributes.get(name)), ours)
            size = _dictionary(attributes.get("_init_kwargs")).get("kernel_size")
            _refuse_other(f"{place} has kernel_size", _plain(size), (1, 3))


def _refuse_other(what, value, ours):
    if value is not _MISSING and value not in ours:
        only = " or ".join(map(_said, ours))
        raise UserError(f"its {what} = {_said(value)}, of which ours has {only} only")


def _fitted(network, module, config):
    """The state under our names, float32, for module(config); UserError if they are not for each
    other.
    """
    state = from_released_names(network.state, discriminator=module is Discriminator)
    what = module.__name__.lower()
    try:
        with torch.device("meta"):  # shapes without memory
            expected = {
                name: tuple(tensor.shape) for name, tensor in module(config).state_dict().items()
            }
    except RuntimeError:  # a size beyond 2⁶³
        raise UserError(f"its {what} has shapes that do not fit each other") from None
    for name in sorted(expected.keys() | state.keys()):
        if name not in expected:
            raise UserError(
                f"its {what} has {shown(name)}, which ours has not: another architecture"
            )
        if name not in state:
            raise UserError(f"its {what} has no {name}")
        if tuple(state[name].shape) != expected[name]:
            raise UserError(
                f"its {what} has {name} of shape {tuple(state[name].shape)}, but the rest of it "
                "goes with "
                f"{expected[name]}"
            )
        if not all(map(math.isfinite, state[name].float().aminmax())):
            raise UserError(f"its {what} has {name} with numbers that are not finite in float32")
    return {name: state[name].float().contiguous() for name in expected}


def _check_dtypes(networks):
    """Numbers of plain floating point alone: others (float8, complex, integers) are no weights of
    the release, and PyTorch computes with some of them in part only.
    """
    for which, network in networks.items():
        for name, tensor in network.state.items():
            if tensor.dtype not in WEIGHT_DTYPES:
                raise UserError(
                    f"its {which} has {ascii(name)[1:-1][:100]} of {tensor.dtype}, but weights are "
                    "float16, bfloat16, float32 or float64"
                )


def _check_computed(networks, config):
    """What we compute and the release stores must be the same: FIR filters (spec §1) and
    frequencies (§2, §7).
    """
    taps, M = torch.tensor([1.0, 3, 3, 1]), config.max_num_frames
    longest, shortest = (
        math.log2(config.max_period),
        math.log2(config.shortest_period or config.motion_distance),
    )
    period = torch.exp2(
        torch.linspace(longest, shortest, config.num_frequencies, dtype=torch.float64)
    )
    octaves = torch.arange(int(math.log2(M)), dtype=torch.float64)
    expected = {
        "resample_filter": torch.outer(taps, taps) / 64,
        "freqs": 2 * math.pi / period,
        "phase_scales": config.max_period / period,
        "fourier_coefs": math.pi * torch.exp2(octaves) / M,
    }
    for network in networks.values():
        for name, tensor in network.state.items():
            computed = expected.get(name.rpartition(".")[2]) if _COMPUTED.search(name) else None
            if computed is None:
                continue
            tensor = tensor.double().squeeze(0)
            if tensor.shape != computed.shape or not torch.allclose(
                tensor, computed.double(), rtol=1e-4
            ):
                raise UserError(
                    f"its {ascii(name)[1:-1][:100]} is not what this configuration computes"
                )
