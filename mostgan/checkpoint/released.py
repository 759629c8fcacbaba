"""Released checkpoints of MoStGAN-V and StyleGAN-V: their networks under our names, and their
configuration.

A released file is a pickle {'G': …, 'D': …, 'G_ema': …} of modules (spec §10), which pickles.py
reads as data. The configuration is pickled with them. What it says is compared with what the
tensors show, and the two must agree; what only the tensors show, as in a plain state dict, is
inferred, and said to be.
"""

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
from mostgan.files import sha256_of
from mostgan.model import Generator
from mostgan.motion import content_latent

HALF_PRECISION_LAYERS = 4  # the highest resolutions, which the release runs so (spec §6)
MOST_MODULES, MOST_TENSORS, DEEPEST = 2000, 10_000, 20  # of a network; usually 130, 200 and 6
MOST_STEPS = 200  # nodes and references to be followed for one value of a configuration
MOST_NUMBER = 2**31  # in a configuration
MOST_GROUP = 2**16  # clips whose statistics the discriminator pools; usually 4
MOST_CLASSES, CLASS_LATENTS, CLASS_SEED = 4096, 1000, 2**40  # for the mean w of each class
USUAL_FPS = 25.0  # of data sets, where a file does not tell
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# ------------------------------------------------------------------------------- names and places

# Buffers that follow from the configuration.
_COMPUTED = re.compile(r"(resample_filter|\.freqs|\.phase_scales|\.fourier_coefs)$")
_FREQUENCIES = "synthesis.motion_encoder.time_encoder.freqs"
_RENAMED = [  # released name → ours
    (r"^mapping\.(fc\d+)", r"mapping.layers.\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.weight", r"motion_codes.conv\1"),
    (r"^synthesis\.motion_encoder\.conv\.(\d)\.bias", r"motion_codes.conv\1_bias"),
    (r"^synthesis\.motion_encoder\.time_encoder\.periods_predictor", "motion_codes.period"),
    (r"^synthesis\.motion_encoder\.time_encoder\.phase_predictor", "motion_codes.phase"),
    (r"^synthesis\.motion_encoder\.time_encoder\.aligners_predictor", "motion_codes.aligner"),
    (r"^synthesis\.multimotionmap\.(\d)", r"motion_network.fc\1"),
    # Without conv0: files of late 2022.
    (r"^(synthesis\.b\d+\.conv\d)\.hypernet(\.conv0)?\.", r"\1.hypernetwork."),
    (r"^synthesis\.b4\.input\.input\.const", "synthesis.b4.const"),
]
_RENAMED_DISCRIMINATOR = [
    (r"^mapping\.embed", "time_condition.embed"),
    (r"^mapping\.(fc\d+)", r"time_condition.layers.\1"),
    (r"^time_encoder\.const_embed", "time_condition.table"),
]

# Where the pickled configuration of a generator, and of a discriminator, has a field of ours.
_IN_GENERATOR = [
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
]
_IN_DISCRIMINATOR = [
    ("max_num_frames", "sampling.max_num_frames"),
    ("frames_per_clip", "sampling.num_frames_per_video"),
    ("concat_resolution", "concat_res"),
    ("motion_difference", "motion_diff"),
    ("discriminator_hidden_dim", "motion_dim"),
    ("mbstd_group", "mbstd_group_size"),
    ("time_condition", "dummy_c"),
]
# The whole run's configuration hangs on the generator's: so a generator alone says what a new
# discriminator should be.
_IN_GENERATOR += [(name, f"model.discriminator.{path}") for name, path in _IN_DISCRIMINATOR]
# What MoStGAN-V added: a file of StyleGAN-V may have settings of it, which then mean nothing.
_OF_MOSTGAN_V = {"motion_styles", "motion_vector_dim", "motion_resolutions", "rank"}
_OF_MOSTGAN_V |= {"motion_difference", "discriminator_hidden_dim"}

# Fields that follow from the half precision, and one that the release has no choice of.
_FOLLOWING = {"prenorm_resolutions", "motion_demod_only_resolutions", "modulation_order"}

# Options of the release, and what ours has of them: in the pickled configuration, and among the
# attributes of modules and the arguments that they were made with.
_OPTIONS = {
    "motion.gen_strategy": ("conv",),
    "motion.kernel_size": (11,),
    "motion.fourier": (True,),
    "motion.use_fractional_t": (True,),
    "input.type": ("temporal",),
    "time_enc.cond_type": ("concat_const",),
    "use_noise": (False,),
    "num_frames_div_factor": (2,),
    "spectral_norm": (False,),
    "softmask": (False,),
}
_MODULE_OPTIONS = {
    "activation": ("lrelu", "linear"),
    "architecture": ("skip", "resnet"),
    "img_channels": (3,),
    "instance_norm": (False,),
    "kernel_size": (1, 3),
    "num_channels": (1,),
    "skip_small_t_freqs": (0,),
    "spectral_norm": (False,),
    "use_noise": (False,),
}
# The layers whose conv_clamp bounds activations (spec §1).
_CLAMPED = re.compile(r"(synthesis\.)?b\d+\.(conv0|conv1|torgb|fromrgb|conv)")


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


# ------------------------------------------------------------------------------------- the import


@dataclass
class Network:
    """A network as the file has it."""

    state: dict[str, torch.Tensor]
    """its tensors under released names"""
    class_name: str | None = None
    attributes: dict[str, dict] = field(default_factory=dict)
    """what else its modules store: path of the module → attributes; none of a plain state dict"""

    @property
    def cfg(self):
        """The pickled configuration, or None."""
        return self.attributes.get("", {}).get("cfg")

    def arguments(self, path, name):
        """Those named so that the module at path was made with, as a dictionary."""
        made_with = _dictionary(self.attributes.get(path, {}).get("_init_kwargs"))
        return _dictionary(made_with.get(name)) if name else made_with


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
        for which, found in networks.items():
            _check_dtypes(which, found)
            _check_options(which, found)
        config, notes = find_config(
            networks[names[0]], networks.get("D"), half_precision, motion_distance
        )
        fitted = {name: _fitted(name, found, config) for name, found in networks.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ArithmeticError, ValueError, TypeError) as error:  # numbers that are out of all bounds
        raise UserError(f"{path}: its configuration makes no sense: {shown(str(error))}") from None
    means = None
    if classes and 0 < config.num_labels <= MOST_CLASSES:
        means = class_means(fitted[names[0]], config)
    provenance = {
        "imported_from": str(path),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "network": names[0],
        "class": networks[names[0]].class_name,
        "with": names[1:],
        "configuration": notes,
    }
    return Imported(config, fitted, means, provenance, notes)


@torch.no_grad()
def class_means(state, config):
    """The mean w of each class over 1,000 latents, the same for all classes: float32 [num_labels,
    w_dim].
    """
    with torch.device("meta"):
        generator = Generator(config)
    generator.load_state_dict(state, assign=True)
    z = content_latent(range(CLASS_SEED, CLASS_SEED + CLASS_LATENTS), config.z_dim)
    labels = torch.eye(config.num_labels)
    return torch.stack([generator.mapping(z, c.expand(len(z), -1)).mean(dim=0) for c in labels])


# --------------------------------------------------------------------------- the networks of a file


def read_networks(path, names):
    """({name: Network}, whether labels may be classes). Raises UserError if a network is missing or
    is none.
    """
    if path.suffix == ".safetensors":
        found = _read_safetensors(path, names)
        _check_present(path, found, names)
        return {name: Network(found[name]) for name in names}, True
    with pickles.opened(path) as found:
        if isinstance(found, Inert) or _is_state(found):  # one network alone
            found = {names[0]: found}
        if not isinstance(found, dict):
            raise UserError(f"{path} holds no networks by name (G, D, G_ema)")
        _check_present(path, found, names)
        return {name: _network(found[name]) for name in names}, _are_classes(found.get("vis"))


def _check_present(path, found, names):
    missing = [name for name in names if name not in found]
    if missing:
        held = ascii(", ".join(key[:20] for key in list(found)[:8] if type(key) is str))[1:-1]
        raise UserError(f"{path} has no {missing[0]}" + (f", only {held}" if held else ""))


def _are_classes(vis):
    """Whether the labels of the sample grids are one-hot, as far as the file has any."""
    grids = _dictionary(vis).get("grid_c")
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
    """Whether a value of a pickle is a plain state dict."""
    items = value.items() if isinstance(value, dict) else ()
    return bool(items) and all(type(k) is str and isinstance(v, pickles.Tensor) for k, v in items)


def _network(value):
    """A module, or a plain state dict, of a pickle → Network. Raises Refused."""
    if _is_state(value):
        return Network(pickles.read_tensors(value))
    if not isinstance(value, Inert):
        raise Refused(f"a {type(value).__name__} where a network should be")
    tensors, attributes = {}, {}
    todo = [("", value, ())]
    while todo:
        path, module, above = todo.pop()
        if id(module) in above or len(above) > DEEPEST:
            raise Refused(f"the module {path} contains itself, or others more than {DEEPEST} deep")
        own_tensors, children = _content(path or "the network", module)
        attributes[path] = module.state
        prefix = path and path + "."
        tensors |= {prefix + key: tensor for key, tensor in own_tensors.items()}
        todo += [(prefix + key, child, (*above, id(module))) for key, child in children.items()]
        if len(attributes) + len(todo) > MOST_MODULES or len(tensors) > MOST_TENSORS:
            most = f"{MOST_MODULES} modules or {MOST_TENSORS} tensors"
            raise Refused(f"a network of more than {most}")
    return Network(pickles.read_tensors(tensors), value.name, attributes)


def _content(path, module):
    """A module's own tensors, as far as they belong to its state, and its child modules, by
    name.
    """
    state = module.state if isinstance(module, Inert) else None
    keys = ("_parameters", "_buffers", "_modules")
    parts = [_dictionary(state).get(key) or {} for key in keys]
    if not isinstance(state, dict) or not all(isinstance(part, dict) for part in parts):
        raise Refused(f"{path} is no module")
    names = [key for part in parts for key in part]
    if not all(type(key) is str and re.fullmatch(r"\w{1,100}", key, re.ASCII) for key in names):
        raise Refused(f"{path} has parts without a proper name")
    passing = state.get("_non_persistent_buffers_set")
    passing = passing if isinstance(passing, set) else ()
    parameters, buffers, modules = parts
    tensors = parameters | {key: of for key, of in buffers.items() if key not in passing}
    tensors = {key: of for key, of in tensors.items() if of is not None}
    for key, of in tensors.items():
        if not isinstance(of, pickles.Tensor):
            raise Refused(f"{path}.{key} is no tensor")
    return tensors, {key: of for key, of in modules.items() if of is not None}


def _dictionary(value):
    return value if isinstance(value, dict) else {}


# --------------------------------------------------------------------- the pickled configuration


_MISSING = object()


def look_up(cfg, path):
    """The value at a dotted path of a pickled configuration, references followed, and those of a
    list's items; _MISSING if there is none, or None.

    Nodes are omegaconf's: `_content` of dictionaries and lists, `_val` of leaves. A text `${a.b}`
    stands for what is at a.b, counted from the root of all that cfg is a part of; so are paths that
    begin with `model`. Raises UserError on references that lead nowhere.
    """
    root, left = _root(cfg), MOST_STEPS

    def walk(node, keys):
        node = content(node)
        for key in keys:
            if not isinstance(node, dict) or key not in node:
                return _MISSING
            node = content(node[key])
        return node

    def content(node):
        """A node's dictionary or list of nodes, or its plain value."""
        nonlocal left
        while True:
            reference = type(node) is str and re.fullmatch(r"\$\{([\w.]{1,200})\}", node)
            if not reference and not isinstance(node, Inert):
                return node
            left -= 1
            if left < 0:
                raise UserError(f"its configuration's {path} refers to itself, or to too much")
            if reference:
                found = walk(root, reference[1].split("."))
                if found is _MISSING:
                    where = f"{shown(node)}, which is not there"
                    raise UserError(f"its configuration's {path} refers to {where}")
                return found
            held = [key for key in ("_val", "_content") if key in _dictionary(node.state)]
            if not held:
                return node  # no node of a configuration
            node = node.state[held[0]]

    value = walk(root if path.startswith("model.") else cfg, path.split("."))
    if isinstance(value, list):
        return [content(item) for item in value]
    return _MISSING if value is None else value


def _root(node):
    seen = set()
    while isinstance(node, Inert) and id(node) not in seen:
        seen.add(id(node))
        parent = _dictionary(node.state).get("_parent")
        if not isinstance(parent, Inert):
            break
        node = parent
    return node


def _plain(value):
    return value if type(value) in (str, int, float, bool) else _MISSING


def _number(value, what):
    if type(value) not in (int, float) or not abs(value) <= MOST_NUMBER:
        raise UserError(f"{what} is {_said(value)}, but must be a number")
    return int(value) if value == int(value) else value


def _said(value):
    """A value, or several, fit to be printed."""
    return (
        ", ".join(map(shown, value)) or "none" if isinstance(value, tuple | list) else shown(value)
    )


# -------------------------------------------------------------------------------- the configuration


class Evidence:
    """What the tensors show of each field, and what the configuration says: all must agree."""

    def __init__(self):
        self.values, self.places, self.inferred = {}, {}, set()

    def show(self, values, where):
        """What tensors show. It comes first."""
        for name, value in values.items():
            self.values[name], self.places[name] = value, where
            self.inferred.add(name)

    def say(self, name, value, where):
        """What the configuration says of a field. None as a value says something, too."""
        if name in self.values and not _same(self.values[name], value):
            before, place = _said(self.values[name]), self.places[name]
            raise UserError(f"its {name} is {_said(value)} by {where}, but {before} by {place}")
        if name not in self.values or name in self.inferred:
            self.values[name], self.places[name] = value, where
        self.inferred.discard(name)


def _same(a, b):
    numbers = all(type(value) in (int, float) for value in (a, b))
    return math.isclose(a, b, rel_tol=1e-4) if numbers else a == b


def find_config(generator, discriminator=None, half_precision=None, motion_distance=None):
    """Networks → ModelConfig, and a line about it. Arguments as in `read_released`. Raises
    UserError.
    """
    evidence = Evidence()
    resolutions = _show_generator(evidence, generator.state)
    networks = [(generator, _IN_GENERATOR)]
    if discriminator is not None:
        _show_discriminator(evidence, discriminator.state)
        networks.append((discriminator, _IN_DISCRIMINATOR))
    for network, fields in networks:
        _say_configuration(evidence, network, fields, resolutions)
        _say_attributes(evidence, network)
    if motion_distance is not None:
        evidence.say("motion_distance", motion_distance, "--motion-distance")
    values = evidence.values
    if "motion_distance" not in values:
        if "shortest_period" not in values:
            raise UserError(
                f"it has no {_FREQUENCIES} to tell the motion distance: give --motion-distance"
            )
        evidence.show({"motion_distance": values["shortest_period"]}, "the shortest period")
    if "fps" not in values:
        evidence.show({"fps": USUAL_FPS}, "most data sets")
    if values.get("shortest_period") == values["motion_distance"]:
        del values["shortest_period"]
    channels = _channels(generator, resolutions)
    halves, how = _half_precision(generator, resolutions, half_precision)
    motion_halves = tuple(r for r in halves if r in values["motion_resolutions"])
    config = ModelConfig(
        **values | channels,
        prenorm_resolutions=halves,
        motion_demod_only_resolutions=motion_halves,
    )
    _check_computed([network for network, _ in networks], config)
    told = asdict(config)
    text = ", ".join(f"{name} {_said(value)}" for name, value in told.items())
    by_tensors, by_default = evidence.inferred, told.keys() - evidence.places - _FOLLOWING
    return config, (
        f"{text}; half precision in the release: {how}; by default: {_said(sorted(by_default))}; "
        f"inferred from the tensors alone: {_said(sorted(by_tensors))}"
    )


def _shape(state, name, dims):
    """A tensor's shape. Raises UserError if there is no such tensor."""
    shape = tuple(state[name].shape) if name in state else ()
    if len(shape) != dims or 0 in shape:
        raise UserError(
            f"it has no {name} of {dims} dimensions: this is no network of MoStGAN-V or StyleGAN-V"
        )
    return shape


def _show_generator(evidence, released):
    """What the generator's tensors show (spec §2 to §6). Returns its resolutions."""
    state = from_released_names(released)
    blocks = (re.fullmatch(r"synthesis\.b(\d{1,4})\.torgb\.bias", name) for name in state)
    resolutions = sorted(int(block[1]) for block in blocks if block)
    if not resolutions:
        raise UserError(
            "it has no synthesis blocks: this is no generator of MoStGAN-V or StyleGAN-V"
        )
    w_dim, fc0 = _shape(state, "mapping.layers.fc0.weight", 2)
    labels = 0
    if "mapping.embed.weight" in state:
        labels = _shape(state, "mapping.embed.weight", 2)[1]
    values = dict(
        resolution=resolutions[-1],
        w_dim=w_dim,
        z_dim=fc0 - (w_dim if labels else 0),
        num_labels=labels,
        mapping_layers=sum(
            re.fullmatch(r"mapping\.layers\.fc\d+\.weight", name) is not None for name in state
        ),
        motion_noise_dim=_shape(state, "motion_codes.conv0", 3)[0],
        motion_code_dim=_shape(state, "motion_codes.aligner.weight", 2)[0],
        num_frequencies=_shape(state, "motion_codes.period.weight", 2)[0],
    )
    evidence.show(values | _motion_styles(state, resolutions, w_dim), "the shapes of its tensors")
    if _FREQUENCIES in released:
        evidence.show(_periods(released[_FREQUENCIES].double().flatten()), "its frequencies")
    return resolutions


def _periods(freqs):
    """Shortest and longest period, from the frequencies ω = 2π / period, longest period first (spec
    §2).
    """
    if not len(freqs) or not ((freqs > 1e-6) & (freqs < 7)).all():
        raise UserError(f"its {_FREQUENCIES} are no frequencies")
    periods = {}
    for name, omega in (("shortest_period", freqs[-1]), ("max_period", freqs[0])):
        period = round(2 * math.pi / float(omega), 3)
        whole = math.isclose(period, round(period), rel_tol=1e-4)
        periods[name] = round(period) if whole else period
    return periods


def _motion_styles(state, resolutions, w_dim):
    """K, motion vectors, rank and where they act: of a MoStGAN-V generator; K = 0 of
    StyleGAN-V's.
    """
    if "motion_network.fc0.weight" not in state:
        return dict(motion_styles=0, motion_resolutions=())
    name = "synthesis.b{}.conv1.hypernetwork.weight"
    motion = tuple(r for r in resolutions if name.format(r) in state)
    styles = _shape(state, "motion_network.fc0.weight", 2)[0] // w_dim
    if not motion or not styles:
        raise UserError("it has a motion network but no layers with motion styles")
    in_channels = _shape(state, f"synthesis.b{motion[0]}.conv1.weight", 4)[1]
    affine = f"synthesis.b{motion[0]}.conv1.hypernetwork.bias" in state
    return dict(
        motion_styles=styles,
        motion_vector_dim=_shape(state, "motion_network.fc1.weight", 2)[0] // styles,
        rank=_shape(state, name.format(motion[0]), 2)[0] // (in_channels + 3 + 3),
        motion_resolutions=motion,
        hypernetwork="affine" if affine else "lrelu",
    )


def _show_discriminator(evidence, released):
    """What only the discriminator's tensors show (spec §7)."""
    state = from_released_names(released, discriminator=True)
    rows, width = _shape(state, "time_condition.table.weight", 2)
    conditions = _shape(state, "time_condition.embed.weight", 2)[1] - evidence.values["num_labels"]
    frames = conditions // (width + 2 * int(math.log2(rows))) + 1
    values = dict(
        max_num_frames=rows,
        frames_per_clip=frames,
        discriminator_hidden_dim=_shape(state, "b4.fc.weight", 2)[0],
    )
    r = evidence.values["resolution"]
    while r > 8:  # the block that takes all images of a clip has as many times more input channels
        inputs = _shape(state, f"b{r // 2}.conv0.weight", 4)[1]
        images, rest = divmod(inputs, _shape(state, f"b{r}.conv1.weight", 4)[0])
        r //= 2
        if images > 1 and not rest:
            values |= dict(concat_resolution=r, motion_difference=images == 2 * frames)
    evidence.show(values, "the shapes of the discriminator's tensors")


def _say_configuration(evidence, network, fields, resolutions):
    """What a network's pickled configuration says of each field."""
    for name, path in fields:
        value = look_up(network.cfg, path)
        if value is _MISSING or name in _OF_MOSTGAN_V and not evidence.values["motion_styles"]:
            continue
        if name == "motion_resolutions":
            numbers = re.findall(r"\d+", _said(value))
            value = tuple(r for r in resolutions if str(r) in numbers)
        elif name in ("motion_difference", "time_condition"):
            value = bool(value) != path.endswith("dummy_c")
        else:
            value = _number(value, f"its configuration's {path}")
        evidence.say(name, value, f"its configuration's {path}")


def _say_attributes(evidence, network):
    """What the attributes of a network's modules, and their arguments, say."""
    whole = network.attributes.get("", {})
    for name, value in (
        ("resolution", whole.get("img_resolution")),
        ("num_labels", whole.get("c_dim")),
        ("mapping_layers", network.arguments("", "mapping_kwargs").get("num_layers")),
    ):
        if type(value) is int:
            evidence.say(name, value, f"the attributes of {network.class_name}")
    for path, attributes in network.attributes.items():
        clamp = attributes.get("conv_clamp")
        if _CLAMPED.fullmatch(path):
            if clamp is not None and (type(clamp) not in (int, float) or not 0 < clamp < math.inf):
                raise UserError(f"the conv_clamp of its {path} is no positive number")
            evidence.say("activation_clamp", clamp, f"conv_clamp of {path}")
        elif clamp is not None:
            raise UserError(f"its {path} has a conv_clamp, and ours has none there")
        if "group_size" in attributes:
            group = attributes["group_size"]
            if type(group) is not int or not 0 < group <= MOST_GROUP:
                number = f"whole number from 1 to {MOST_GROUP:,}"
                raise UserError(f"its discriminator has a group_size that is no {number}")
            evidence.say("mbstd_group", group, f"{path}.group_size")


def _channels(generator, resolutions):
    """channel_base and channel_max, of which the tensors show only what they come to."""
    state, base = generator.state, generator.arguments("", "synthesis_kwargs")
    stored = {r: _shape(state, f"synthesis.b{r}.conv1.weight", 4)[0] for r in resolutions}
    base, most = (base.get(name) for name in ("channel_base", "channel_max"))
    if any(type(value) is not int or value < 1 for value in (base, most)):
        base, most = max(r * c for r, c in stored.items()), max(stored.values())
    return dict(channel_base=base, channel_max=most)


def _half_precision(generator, resolutions, given):
    """The resolutions that the release runs in half precision, and how we know."""
    if given is not None:
        if not set(given) <= set(resolutions):
            raise UserError(f"half_precision is {given}, but its resolutions are {resolutions}")
        return tuple(given), "as given"
    blocks = {r: generator.attributes.get(f"synthesis.b{r}", {}) for r in resolutions}
    stored = {r: block["use_fp16"] for r, block in blocks.items() if "use_fp16" in block}
    for r, value in stored.items():
        if type(value) is not bool:
            raise UserError(f"its block {r} has use_fp16 = {_said(value)}, which is not yes or no")
    if stored:
        return tuple(r for r in stored if stored[r]), "as its blocks store it"
    highest = tuple(r for r in resolutions[-HALF_PRECISION_LAYERS:] if r > 4)
    return highest, "assumed: the four highest, but never 4"


# ------------------------------------------------------------------------------------------ checks


def _check_dtypes(which, network):
    """Numbers of plain floating point alone: others (float8, complex, integers) are no weights of
    the release, and PyTorch computes with some of them in part only.
    """
    for name, tensor in network.state.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"its {which} has {shown(name)} of {tensor.dtype}, but weights are float16, "
                "bfloat16, float32 or float64"
            )


def _check_options(which, network):
    """Raise UserError, with the option's name, on what the release can do and ours cannot."""
    found = [
        (f"{which} has {path}", look_up(network.cfg, path), _OPTIONS[path]) for path in _OPTIONS
    ]
    for path, attributes in network.attributes.items():
        options = network.arguments(path, None) | attributes
        place = f"{which}.{path}".rstrip(".")
        found += [
            (f"{place} has {name}", _plain(options.get(name)), ours)
            for name, ours in _MODULE_OPTIONS.items()
        ]
    for what, value, ours in found:
        if value is not _MISSING and value not in ours:
            only = " or ".join(map(shown, ours))
            raise UserError(f"its {what} = {_said(value)}, of which ours has {only} only")


def _check_computed(networks, config):
    """What we compute and the release stores must be the same: FIR filters (spec §1) and
    frequencies (§2, §7).
    """
    taps, most = torch.tensor([1.0, 3, 3, 1]), config.max_num_frames
    shortest = config.shortest_period or config.motion_distance
    ends = math.log2(config.max_period), math.log2(shortest)
    period = torch.exp2(torch.linspace(*ends, config.num_frequencies, dtype=torch.float64))
    octaves = torch.arange(int(math.log2(most)), dtype=torch.float64)
    expected = {
        "resample_filter": torch.outer(taps, taps).double() / 64,
        "freqs": 2 * math.pi / period,
        "phase_scales": config.max_period / period,
        "fourier_coefs": math.pi * torch.exp2(octaves) / most,
    }
    for network in networks:
        for name, tensor in network.state.items():
            if not _COMPUTED.search(name):
                continue
            computed, tensor = expected[name.rpartition(".")[2]], tensor.double().squeeze(0)
            if tensor.shape != computed.shape or not torch.allclose(tensor, computed, rtol=1e-4):
                raise UserError(f"its {shown(name)} is not what this configuration computes")


def _fitted(which, network, config):
    """The state under our names, float32, for a network of config; UserError if they are not for
    each other.
    """
    module = Discriminator if which == "D" else Generator
    state = from_released_names(network.state, discriminator=which == "D")
    try:
        with torch.device("meta"):  # shapes without memory
            expected = module(config).state_dict()
    except RuntimeError:  # a size beyond 2⁶³
        raise UserError(f"its {which} has shapes that do not fit each other") from None
    for name in sorted(expected.keys() | state.keys()):
        if name not in expected:
            what = f"its {which} has {shown(name)}"
            raise UserError(f"{what}, which ours has not: another architecture")
        if name not in state:
            raise UserError(f"its {which} has no {name}")
        if state[name].shape != expected[name].shape:
            raise UserError(
                f"its {which} has {name} of shape {tuple(state[name].shape)}, but the rest of it "
                f"goes with {tuple(expected[name].shape)}"
            )
        if not all(map(math.isfinite, state[name].float().aminmax())):
            raise UserError(f"its {which} has {name} with numbers that are not finite in float32")
    return {name: state[name].float().contiguous() for name in expected}
