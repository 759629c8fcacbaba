"""Makes snapshots as the release writes them, of networks of ours: what the tests of the import
read.

Classes stand under the release's module paths only while something is pickled, so nothing that
reads a snapshot later can find them. The structure follows the notes on the release: persistent
objects are a call whose argument carries a source text, a class name and a state; two kinds of
module and PyTorch's own are pickled plainly; the configuration is a graph of omegaconf's nodes in
which child and parent know each other.
"""

import collections
import io
import math
import pickle
import sys
import types
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

PERSISTENCE = "src.torch_utils.persistence"


def _classes():
    """Full name → stand-in class, as they are called in a released file."""
    made = {}
    for full in (
        "training.layers.Conv1d",
        "training.layers.TemporalDifferenceEncoder",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        "omegaconf.nodes.AnyNode",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
    ):
        module, _, name = full.rpartition(".")
        made[full] = type(name, (), {"__module__": module})
    made["src.dnnlib.util.EasyDict"] = type("EasyDict", (dict,), {"__module__": "src.dnnlib.util"})
    return made


CLASSES = _classes()
EasyDict = CLASSES["src.dnnlib.util.EasyDict"]


def rebuild(meta):
    """What `_reconstruct_persistent_obj` would do: run the source that the file carries."""
    exec(meta["module_src"], {})


rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = (
    PERSISTENCE,
    "_reconstruct_persistent_obj",
    "_reconstruct_persistent_obj",
)


@contextmanager
def released_modules():
    """The release's module paths can be imported from, as pickling by name needs it."""
    members = {**CLASSES, f"{PERSISTENCE}._reconstruct_persistent_obj": rebuild}
    before = dict(sys.modules)
    try:
        for full, member in members.items():
            path, _, name = full.rpartition(".")
            parts = path.split(".")
            for i in range(len(parts)):
                sys.modules.setdefault(".".join(parts[: i + 1]), types.ModuleType(parts[i]))
            setattr(sys.modules[path], name, member)
        yield
    finally:
        for name in set(sys.modules) - set(before):
            del sys.modules[name]


class Persistent:
    """A module of a class that carries its own source."""

    source = "raise SystemExit('the source of a snapshot was run')"

    def __init__(self, class_name, **attributes):
        self.class_name, self.state = class_name, module_state(attributes)

    def __reduce__(self):
        meta = dict(
            type="class",
            version=6,
            module_src=self.source,
            class_name=self.class_name,
            state=self.state,
        )
        return rebuild, (meta,)


def module_state(attributes):
    return dict(
        training=False,
        _parameters=collections.OrderedDict(),
        _buffers=collections.OrderedDict(),
        _non_persistent_buffers_set=set(),
        _forward_hooks=collections.OrderedDict(),
        _modules=collections.OrderedDict(),
        _init_args=(),
        _init_kwargs=EasyDict(),
        **attributes,
    )


def state_of(module):
    return module.state if isinstance(module, Persistent) else module.__dict__


def plain(full, **attributes):
    """A module that is pickled by its class's path alone."""
    made = CLASSES[full].__new__(CLASSES[full])
    made.__dict__.update(module_state(attributes))
    return made


# ------------------------------------------------------------------------ the pickled configuration


def node(value, parent=None):
    """A dictionary, list or plain value → omegaconf's nodes, children and parents tied together."""
    kind = {dict: "dictconfig.DictConfig", list: "listconfig.ListConfig"}.get(
        type(value), "nodes.AnyNode"
    )
    made = CLASSES[f"omegaconf.{kind}"].__new__(CLASSES[f"omegaconf.{kind}"])
    metadata = CLASSES["omegaconf.base.ContainerMetadata"]()
    metadata.__dict__.update(
        ref_type=Any, object_type=dict, resolver_cache=collections.defaultdict(dict)
    )
    made.__dict__.update(_metadata=metadata, _parent=parent)
    if isinstance(value, dict):
        made._content = {key: node(child, made) for key, child in value.items()}
    elif isinstance(value, list):
        made._content = [node(child, made) for child in value]
    else:
        made._val = value
    return made


def run_configuration(config, **changes):
    """A run's configuration as plain dictionaries, with the release's references; changes: dotted
    path → value.
    """
    styles = {}
    if config.motion_styles:
        styles = dict(
            word_mod=True,
            motion_num=config.motion_styles,
            motion_dim=config.motion_vector_dim,
            rank=config.rank,
            mod_layers=",".join(map(str, (*config.motion_resolutions, 1024))),
        )
    generator = dict(
        source="networks",
        w_dim=config.w_dim,
        z_dim=config.z_dim,
        c_dim="${dataset.c_dim}",
        use_noise=False,
        input=dict(type="temporal"),
        motion=dict(
            motion_z_distance="${dataset.motion_z_distance}",
            z_dim=config.motion_noise_dim,
            v_dim=config.motion_noise_dim,
            kernel_size=11,
            gen_strategy="conv",
            use_fractional_t=True,
            fourier=True,
            time_enc={},
        ),
        time_enc=dict(
            cond_type="concat_const",
            dim=config.num_frequencies,
            min_period_len=config.shortest_period or "${model.generator.motion.motion_z_distance}",
            max_period_len=config.max_period,
        ),
        sampling="${sampling}",
        **styles,
    )
    discriminator = dict(
        source="networks",
        sampling="${sampling}",
        mbstd_group_size=config.mbstd_group,
        concat_res=config.concat_resolution,
        num_frames_div_factor=2,
        dummy_c=not config.time_condition,
    )
    if config.motion_styles:
        discriminator |= dict(
            motion_diff=config.motion_difference, motion_dim=config.discriminator_hidden_dim
        )
    whole = dict(
        model=dict(name="stylegan-v", generator=generator, discriminator=discriminator),
        dataset=dict(
            c_dim=config.num_labels,
            fps=config.fps or 25,
            motion_z_distance=config.motion_distance,
            max_num_frames=config.max_num_frames,
            name="clips_${dataset.resolution}",
            resolution=config.resolution,
        ),
        sampling=dict(
            type="random",
            fps="${dataset.fps}",
            max_num_frames="${dataset.max_num_frames}",
            num_frames_per_video=config.frames_per_clip,
            total_dists=[1, 2, 4],
        ),
    )
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = whole
        for key in parents:
            place = place[key]
        place[last] = value
    return whole


# ----------------------------------------------------------------------------------- the networks


RELEASED_GENERATOR = [  # our name → the released one
    ("mapping.layers.", "mapping."),
    ("motion_codes.conv0_bias", "synthesis.motion_encoder.conv.0.bias"),
    ("motion_codes.conv1_bias", "synthesis.motion_encoder.conv.1.bias"),
    ("motion_codes.conv0", "synthesis.motion_encoder.conv.0.weight"),
    ("motion_codes.conv1", "synthesis.motion_encoder.conv.1.weight"),
    ("motion_codes.period", "synthesis.motion_encoder.time_encoder.periods_predictor"),
    ("motion_codes.phase", "synthesis.motion_encoder.time_encoder.phase_predictor"),
    ("motion_codes.aligner", "synthesis.motion_encoder.time_encoder.aligners_predictor"),
    ("motion_network.fc", "synthesis.multimotionmap."),
    ("synthesis.b4.const", "synthesis.b4.input.input.const"),
]
RELEASED_DISCRIMINATOR = [
    ("time_condition.embed", "mapping.embed"),
    ("time_condition.layers.", "mapping."),
    ("time_condition.table", "time_encoder.const_embed"),
]


def released_state(network, discriminator=False):
    """The state dict of a network of ours under the released names, with what the release stores
    and we compute.
    """
    config, state = network.config, {}
    for name, tensor in network.state_dict().items():
        for ours, theirs in RELEASED_DISCRIMINATOR if discriminator else RELEASED_GENERATOR:
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        if ".hypernetwork." in name:
            layout = ".hypernet." if config.hypernetwork == "affine" else ".hypernet.conv0."
            name = name.replace(".hypernetwork.", layout)
            tensor = tensor if config.hypernetwork == "affine" else tensor[:, :, None, None]
        state[name] = tensor[None] if name.endswith("input.const") else tensor
    taps = torch.tensor([1.0, 3, 3, 1])
    for name in [
        name for name in state if name.endswith("conv0.weight") and "hypernet" not in name
    ]:
        state[name.replace("weight", "resample_filter")] = torch.outer(taps, taps) / 64
    if discriminator:
        octaves = torch.arange(int(math.log2(config.max_num_frames)))
        coefs = math.pi * torch.exp2(octaves.float()) / config.max_num_frames
        state["time_encoder.time_encoder.fourier_coefs"] = coefs[None]
    else:
        omega = network.motion_codes.frequencies("cpu")
        encoder = "synthesis.motion_encoder.time_encoder"
        state[f"{encoder}.freqs"] = omega.float()[None]
        state[f"{encoder}.phase_scales"] = (config.max_period * omega / (2 * math.pi)).float()[None]
    return state


def pickled_network(state, class_name, cfg=None, attributes=None, **own):
    """A state dict of released names as nested modules; attributes: path of a module → more of its
    attributes.
    """
    attributes = attributes or {}
    root = Persistent(class_name, **own, **({} if cfg is None else {"cfg": cfg}))
    for name, tensor in state.items():
        module, path = root, []
        *parents, last = name.split(".")
        for part in parents:
            path.append(part)
            children = state_of(module)["_modules"]
            if part not in children:
                children[part] = _module(".".join(path), name, attributes.get(".".join(path), {}))
            module = children[part]
        buffer = last in ("w_avg", "resample_filter", "freqs", "phase_scales", "fourier_coefs")
        kind = "_buffers" if buffer else "_parameters"
        state_of(module)[kind][last] = tensor if buffer else torch.nn.Parameter(tensor.clone())
    return root


def _module(path, name, attributes):
    last = path.rpartition(".")[2]
    if last in ("multimotionmap", "conv") and "motion" in path:
        return torch.nn.Sequential()
    if last == "const_embed":
        return torch.nn.Embedding(1, 1)
    if last == "hypernet" and ".hypernet.conv0" in name:
        return plain("training.layers.Conv1d")
    if path == "time_encoder":
        return plain("training.layers.TemporalDifferenceEncoder")
    return Persistent("Layer", gain=np.sqrt(2), **attributes)


def layer_attributes(state, config, discriminator=False):
    """Path of a module → what the release stores of it beside its tensors: half precision and
    clamp.
    """
    found = {}
    halves = config.prenorm_resolutions
    for name in state:
        path = name.rpartition(".")[0]
        layer = path.rpartition(".")[2]
        if "hypernet" in path or "affine" in path:
            continue
        if layer in ("conv0", "conv1", "torgb", "fromrgb", "conv") and "motion" not in path:
            found[path] = dict(conv_clamp=config.activation_clamp)
        elif layer == "skip":
            found[path] = dict(conv_clamp=None)
    prefix = "" if discriminator else "synthesis."
    for resolution in config.resolutions:
        if not (discriminator and resolution == 4):
            found[f"{prefix}b{resolution}"] = dict(use_fp16=resolution in halves, img_channels=3)
    return found


def snapshot(
    generator,
    discriminator=None,
    last=None,
    labels=None,
    changes=None,
    attributes=None,
    with_cfg=True,
):
    """What a training snapshot holds, of networks of ours. last: G, if it is not G_ema; labels:
    those of the sample grids; changes: of the run's configuration; attributes: path of a module of
    G_ema or D → changed attributes.
    """
    config = generator.config
    root = node(run_configuration(config, **(changes or {})))
    branch = root._content["model"]._content
    cfg = {name: branch[name] if with_cfg else None for name in ("generator", "discriminator")}
    made = {}
    for name, network in (("G", last or generator), ("D", discriminator), ("G_ema", generator)):
        if network is None:
            continue
        judge = name == "D"
        state = released_state(network, judge)
        more = layer_attributes(state, config, judge)
        for path, values in (attributes or {}).items():
            if path.startswith("synthesis") != judge:
                more[path] = more.get(path, {}) | values
        made[name] = pickled_network(
            state,
            "Discriminator" if judge else "Generator",
            cfg["discriminator" if judge else "generator"],
            more,
            img_resolution=config.resolution,
            c_dim=config.num_labels,
        )
        kwargs = state_of(made[name])["_init_kwargs"]
        kwargs["mapping_kwargs"] = EasyDict(num_layers=config.mapping_layers)
        if not judge:
            channels = dict(channel_base=config.channel_base, channel_max=config.channel_max)
            kwargs["synthesis_kwargs"] = EasyDict(**channels, conv_clamp=config.activation_clamp)
        elif "b4" in state_of(made[name])["_modules"]:
            epilogue = state_of(made[name])["_modules"]["b4"]
            state_of(epilogue)["_modules"]["mbstd"] = Persistent(
                "MinibatchStdLayer", group_size=config.mbstd_group
            )
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(3))])
    adam.param_groups[0]["params"][0].grad = torch.ones(3)
    adam.step()
    grid = torch.zeros(4, config.num_labels) if labels is None else labels
    return dict(
        training_set_kwargs=dict(path="videos.zip"),
        **made,
        augment_pipe=None,
        G_opt=adam,
        vis=dict(num_videos=4, grid_c=(grid,), labels=grid.numpy()),
        stats=dict(cur_nimg=1000),
    )


# ----------------------------------------------------------------------------------------- writing


class StoragePickler(pickle.Pickler):
    """Tensors' storages in the zip format of torch.save, and tensors as PyTorch before 0.4 wrote
    them.
    """

    def reducer_override(self, obj):
        if isinstance(obj, torch.storage.TypedStorage | torch.storage.UntypedStorage):
            file = io.BytesIO()
            torch.save(obj, file)
            return torch.storage._load_from_bytes, (file.getvalue(),)
        if type(obj) is torch.Tensor:
            return torch._utils._rebuild_tensor, (
                obj._typed_storage(),
                obj.storage_offset(),
                obj.shape,
                obj.stride(),
            )
        return NotImplemented


HOWS = ("pickle", "pickle, storages in zips", "torch.save zip", "torch.save legacy")


def write(path, value, how="pickle", protocol=4):
    """Write a value as a pickle, or as torch.save does. Returns the path."""
    with released_modules(), open(path, "wb") as file:
        if how == "pickle":
            pickle.dump(value, file, protocol=protocol)
        elif how == "pickle, storages in zips":
            StoragePickler(file, protocol=protocol).dump(value)
        else:
            zipped = how == "torch.save zip"
            torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path
