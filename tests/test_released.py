"""Released checkpoints: made pickles of their structure are imported, hostile ones refused; export; show."""

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
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mostgan
import sample
from mostgan import checkpoint, commands, unpickle
from mostgan.config import ModelConfig, UserError
from mostgan.discriminator import Discriminator
from mostgan.export import export_file
from mostgan.model import Generator
from mostgan.motion import content_latent, motion_noise
from mostgan.released import from_released_names, read_released
from mostgan.render import to_uint8

ROOT = Path(__file__).parent.parent
HALF = (32,)  # of generator_release: the resolution that the authors' model ran in half precision


def golden(name):
    """(released state, ModelConfig) of a golden file."""
    with safe_open(ROOT / "tests" / "golden" / f"{name}.safetensors", "pt") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
        return {k.removeprefix("state."): file.get_tensor(k) for k in file.keys() if k.startswith("state.")}, config


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that exists once something of a pickle was executed; and the release's modules, to be referred to."""
    for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    rebuild = types.FunctionType((lambda meta: Path(meta["canary"]).touch()).__code__, {"Path": Path})
    rebuild.__module__, rebuild.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = rebuild
    easy_dict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    sys.modules["dnnlib.util"].EasyDict = easy_dict
    Module.rebuild, Module.easy_dict, Module.canary = staticmethod(rebuild), easy_dict, str(tmp_path / "canary")
    return tmp_path / "canary"


class Module:
    """Pickles as the release's persistent classes do: a call whose metadata carries source, name and state."""

    def __init__(self, class_name="Layer", **attributes):
        self.class_name = class_name
        self.state = dict(
            training=True, _parameters={}, _buffers={}, _modules={}, _non_persistent_buffers_set=set(), gain=np.sqrt(2),
            _init_kwargs=self.easy_dict(dtype=torch.float32, device=torch.device("cpu"), padding=(1, 1)), **attributes,
        )  # fmt: skip

    def __reduce__(self):
        source = f"import pathlib; pathlib.Path({self.canary!r}).touch()"
        meta = self.easy_dict(type="class", version=6, module_src=source, class_name=self.class_name,
                              state=self.state, canary=self.canary)
        return self.rebuild, (meta,)


def network(state, class_name, **attributes):
    """A state dict as nested modules, with PyTorch's own containers where the release has them."""
    root = Module(class_name, img_resolution=32)
    root.state |= dict(_buffers={"scratch": torch.ones(3)}, _non_persistent_buffers_set={"scratch"})
    for name, tensor in state.items():
        module, path = root, []
        *parents, last = name.split(".")
        for part in parents:
            path.append(part)
            children = parts_of(module)["_modules"]
            if part not in children:
                inert = {"multimotionmap": torch.nn.Sequential(), "const_embed": torch.nn.Embedding(1, 1)}
                children[part] = inert.get(part) or Module(**attributes.get(".".join(path), {}))
            module = children[part]
        if name.endswith(("weight", "bias", "const")):
            parts_of(module)["_parameters"][last] = torch.nn.Parameter(tensor)
        else:
            parts_of(module)["_buffers"][last] = tensor
    return root


def parts_of(module):
    return module.state if isinstance(module, Module) else module.__dict__


class StoragePickler(pickle.Pickler):
    """Tensors' storages in the zip format of torch.save, and tensors as PyTorch before 0.4 wrote them."""

    def reducer_override(self, obj):
        if isinstance(obj, torch.storage.TypedStorage | torch.storage.UntypedStorage):
            file = io.BytesIO()
            torch.save(obj, file)
            return torch.storage._load_from_bytes, (file.getvalue(),)
        if type(obj) is torch.Tensor:
            return torch._utils._rebuild_tensor, (obj._typed_storage(), obj.storage_offset(), obj.shape, obj.stride())
        return NotImplemented


def write(path, value, how="pickle", protocol=2):
    with open(path, "wb") as file:
        if how == "pickle":
            pickle.dump(value, file, protocol=protocol)
        elif how == "pickle, storages in zips":
            StoragePickler(file, protocol=protocol).dump(value)
        else:
            torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "torch.save zip")
    return path


HOWS = ("pickle", "pickle, storages in zips", "torch.save zip", "torch.save legacy")


def snapshot(generator="generator_release", discriminator="discriminator", **attributes):
    """A training snapshot made of golden tensors, whose G is another one than its G_ema."""
    state, config = golden(generator)
    judge, _ = golden(discriminator)
    last = {name: tensor + 1 if name == "mapping.w_avg" else tensor for name, tensor in state.items()}
    attributes |= {"synthesis.b16": {"use_fp16": False}, "synthesis.b32": {"use_fp16": True}}
    whole = dict(training_set_kwargs=Module.easy_dict(path="videos.zip", xflip=True), augment_pipe=None,
                 G=network(last, "Generator", **attributes), D=network(judge, "Discriminator", **attributes),
                 G_ema=network(state, "Generator", **attributes))  # fmt: skip
    return whole, state, config


def frames(generator):
    return torch.cat(list(generator.render(seed=1, frames=5, clips=2, psi=0.7)), dim=1)


def direct(state, config):
    generator = Generator(config)
    generator.load_state_dict(from_released_names(state), strict=True)
    return generator.eval().requires_grad_(False)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_snapshots_in_every_format(tmp_path, canary, how, protocol):
    whole, state, config = snapshot()
    path = write(tmp_path / "network-snapshot.pkl", whole, how, protocol)
    made = read_released(path, discriminator=True)
    assert made.config == config and made.provenance["class"] == "Generator"
    expected = direct(state, config).state_dict()
    assert made.generator.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.generator.items())
    Discriminator(made.config).load_state_dict(made.discriminator, strict=True)
    last = read_released(path, "G").generator["mapping.w_avg"]
    assert torch.equal(last, expected["mapping.w_avg"] + 1)
    assert not canary.exists()


@pytest.mark.parametrize("generator, discriminator", [
    ("generator_release", "discriminator_groups"), ("generator_rank3", "discriminator"),
    ("generator_labels", "discriminator_labels"), ("generator_stylegan_v", "discriminator_stylegan_v"),
])
def test_import_gives_the_direct_models_frames(tmp_path, canary, capsys, generator, discriminator):
    """From the pickle to what sample.py loads, bit for bit; and the configuration that the golden file states."""
    whole, state, config = snapshot(generator, discriminator, **{"b4.mbstd": {"group_size": 2}})
    whole["D"].state["_modules"]["b4"].state["_modules"]["mbstd"] = Module(group_size=2)
    path, out = write(tmp_path / "network-snapshot.pkl", whole), tmp_path / "runs" / "released"
    commands.import_released(path, out, discriminator=True, half_precision=config.prenorm_resolutions)
    assert f"K = {config.motion_styles}" in capsys.readouterr().out or config.motion_styles == 0
    imported = mostgan.load(out)
    if not config.num_labels:
        assert torch.equal(frames(imported), frames(direct(state, config)))
    for name in ("prenorm_resolutions", "motion_demod_only_resolutions", "motion_resolutions", "motion_styles", "rank",
                 "resolution", "channel_base", "channel_max", "motion_distance", "max_period", "num_labels",
                 "max_num_frames", "frames_per_clip", "z_dim"):
        assert getattr(imported.config, name) == getattr(config, name), name
    assert imported.config.motion_difference == ("stylegan_v" not in discriminator)
    assert imported.config.mbstd_group == 2
    judge = Discriminator(imported.config)
    judge.load_state_dict(from_released_names(golden(discriminator)[0], discriminator=True), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(checkpoint.load_discriminator(out).parameters(), judge.parameters()))
    assert not canary.exists()


@pytest.mark.parametrize("group", [10**5000, 10**30, 2**16 + 1, 0, -1, True, 4.0, None], ids=lambda g: type(g).__name__)
def test_a_group_size_that_is_none(tmp_path, canary, group):
    whole, _, _ = snapshot()
    whole["D"].state["_modules"]["b4"].state["_modules"]["mbstd"] = Module(group_size=group)
    path = write(tmp_path / "network-snapshot.pkl", whole)
    with pytest.raises(UserError, match="group_size that is no whole number from 1 to 65,536"):
        read_released(path, discriminator=True)
    assert read_released(path).config.mbstd_group == ModelConfig().mbstd_group  # without D it is of no concern


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("name", [
    "mapping.fc0.weight", "synthesis.motion_encoder.time_encoder.freqs", "synthesis.b8.conv0.resample_filter",
])
def test_weights_of_other_types_are_refused(tmp_path, dtype, name):
    state, _ = golden("generator_release")
    assert name in state
    save_file(state | {name: state[name].to(dtype)}, tmp_path / "state.safetensors")
    with pytest.raises(UserError, match=f"its G_ema has {name} of {dtype}, but weights are"):
        read_released(tmp_path / "state.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_each_floating_type_become_float32(tmp_path, dtype):
    state, _ = golden("generator_release")
    name = "synthesis.b8.conv0.weight"
    save_file(state | {name: state[name].to(dtype)}, tmp_path / "state.safetensors")
    made = read_released(tmp_path / "state.safetensors").generator[name]
    assert made.dtype == torch.float32 and torch.equal(made, state[name].to(dtype).float())
    save_file(state | {name: torch.full_like(state[name], 1e200, dtype=torch.float64)}, tmp_path / "large.safetensors")
    with pytest.raises(UserError, match="not finite in float32"):
        read_released(tmp_path / "large.safetensors")


def test_half_precision_where_it_is_not_stored(tmp_path, canary):
    """The release's four highest resolutions, pre-normalized, and motion as demodulation factor where it acts."""
    state, config = golden("generator")
    path = write(tmp_path / "G.pkl", network(state, "Generator"))  # one network alone
    made = read_released(path)
    assert made.config.prenorm_resolutions == (4, 8, 16, 32)
    assert made.config.motion_demod_only_resolutions == (16, 32)
    assert "four highest" in made.inferred
    of_d = ModelConfig()  # what only a discriminator would tell stays at its default
    assert read_released(path, half_precision=()).config == dataclasses.replace(
        config, max_num_frames=of_d.max_num_frames, discriminator_hidden_dim=of_d.discriminator_hidden_dim)
    with pytest.raises(UserError, match="half_precision"):
        read_released(path, half_precision=(64,))


def test_plain_state_dicts(tmp_path):
    state, config = golden("generator_release")
    judge, _ = golden("discriminator")
    save_file(state | {f"D.{name}": tensor for name, tensor in judge.items()}, tmp_path / "state.safetensors")
    torch.save(state, tmp_path / "state.pt")
    for path in (tmp_path / "state.safetensors", tmp_path / "state.pt"):
        made = read_released(path, discriminator=path.suffix == ".safetensors", half_precision=HALF)
        generator = Generator(made.config)
        generator.load_state_dict(made.generator, strict=True)
        assert torch.equal(frames(generator.eval()), frames(direct(state, config)))
    bare = {name: tensor for name, tensor in state.items() if not name.endswith(("freqs", "phase_scales", "filter"))}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="--motion-distance"):
        read_released(tmp_path / "bare.safetensors")
    assert read_released(tmp_path / "bare.safetensors", motion_distance=64).config.motion_distance == 64
    for name in ("bare", "state"):  # without and with the frequencies that tell
        for distance in (0, -1):
            with pytest.raises(UserError, match="motion_distance"):
                read_released(tmp_path / f"{name}.safetensors", motion_distance=distance)
    with pytest.raises(UserError, match="freqs is not what"):
        read_released(tmp_path / "state.safetensors", motion_distance=32)


def test_sample_from_an_import(tmp_path, canary, capsys):
    whole, _, config = snapshot()
    commands.import_released(write(tmp_path / "snapshot.pkl", whole), tmp_path / "released")
    sample.sample(sample.Options(checkpoint=tmp_path / "released", frames=3, out=tmp_path / "frames"))
    assert len(list((tmp_path / "frames").glob("*.png"))) == 3
    with pytest.raises(UserError, match="is there already"):
        commands.import_released(tmp_path / "snapshot.pkl", tmp_path / "released")


def test_tensors_of_every_kind(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tensors = [base, base.transpose(0, 2), base[1, :, ::2], base.half(), base.bfloat16(), base.long(), base.bool(),
               base.double().to(memory_format=torch.preserve_format), torch.tensor(3.5), torch.nn.Parameter(base),
               base.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)]  # fmt: skip
    tensors[3].note = "an attribute"

    def check(path, what):
        for read, tensor in zip(unpickle.read(path), tensors, strict=True):
            assert read.read().dtype == tensor.dtype and torch.equal(read.read(), tensor), what

    for how in HOWS:
        check(write(tmp_path / "tensors.pkl", tensors, how, 4), how)
    path = write(tmp_path / "tensors.pkl", tensors, "torch.save legacy", 2)
    raw = path.read_bytes()
    assert raw.count(b"X\3\0\0\0cpu") and raw.count(b"ctorch\nFloatStorage")
    path.write_bytes(raw.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0").replace(b"ctorch\nFl", b"ctorch.cuda\nFl"))
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
    whole, _, _ = snapshot()
    whole["G_ema"].state["_modules"]["mapping"].state["_buffers"][name] = value
    return whole


def with_w_avg(value):
    return with_buffer("w_avg", value)


def executing(canary):
    """What would touch the canary, if unpickled as pickle.load does: name in the message → value."""
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    system, evaluate = Call(os.system, f"touch {canary}"), Call(eval, touch)
    legacy = io.BytesIO()
    torch.save([system], legacy, _use_new_zipfile_serialization=False)
    in_zip = zip_of(pickle.dumps(evaluate, protocol=2))
    meta = dict(module_src="", class_name="x", state={}, canary=str(canary))
    return {
        "posix.system": system, "builtins.eval": evaluate, "builtins.exec": Call(exec, touch),
        "posix.system, a weight": with_w_avg(system), "builtins.eval, in G": dict(snapshot()[0], G=evaluate),
        "posix.system, a storage": with_w_avg(tensor_call((4,), (1,), storage=system)),
        "posix.system, within a storage": with_w_avg(tensor_call((4,), (1,), storage=load_bytes(legacy.getvalue()))),
        "builtins.eval, within a zipped storage": with_w_avg(tensor_call((4,), (1,), storage=load_bytes(in_zip))),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "builtins.getattr": Call(getattr, "", "join"),
        f"{__name__}._touch": Call(_touch, meta),
        "posix.system, in an attribute": dict(snapshot()[0], training_set_kwargs={"callback": [system]}),
    }


def _touch(meta):
    Path(meta["canary"]).touch()


EXECUTING = [
    "posix.system", "builtins.eval", "builtins.exec", "posix.system, a weight", "builtins.eval, in G",
    "posix.system, a storage", "posix.system, within a storage", "builtins.eval, within a zipped storage",
    "subprocess.Popen", "builtins.getattr", f"{__name__}._touch", "posix.system, in an attribute",
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
    module = {"subprocess": "commands"}.get(module, module) if protocol == 2 else module  # as Python 2 called it
    refused(path, tmp_path / "out", f"{module}.{name}", "nothing in it was executed")
    assert not canary.exists()
    if case != "builtins.getattr":  # which by itself does nothing
        try:
            pickle.loads(path.read_bytes())
        except (TypeError, AttributeError, RuntimeError):
            pass
        for _ in range(100):
            if not canary.exists() and case == "subprocess.Popen":
                time.sleep(0.1)
        assert canary.exists(), "the test is no test: what it feeds is harmless"


def hostile():
    """name → (what pickles to it or the bytes, words of the refusal)."""
    itself, cycle = Module(), {}
    itself.state["_modules"]["again"] = itself
    cycle["G_ema"] = cycle
    deep = Module()
    for _ in range(30):
        deep = _parent(deep)
    wide = Module()
    for _ in range(15):  # 2¹⁵ paths to the same module
        wide = _parent(wide, wide)
    floats, big = torch.zeros(4)._typed_storage(), torch.zeros(2**20)
    huge = b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"abc."
    amplified = b"\x80\x02c_codecs\nencode\nX" + (2**20).to_bytes(4, "little") + b"a" * 2**20 + b"\x85q\x000"
    amplified += b"c_codecs\nencode\nh\x00R" * 2000 + b"."
    file = io.BytesIO()
    torch.save(torch.zeros(1000)._typed_storage(), file, _use_new_zipfile_serialization=False)
    cut_storage = file.getvalue()[:-9]
    bomb = zip_of(b"\0" * 2**27, compression=zipfile.ZIP_DEFLATED)
    return {
        "a name alone": (dict(snapshot()[0], callback=os.system), "posix.system"),
        "giant shape": (with_w_avg(tensor_call((10**6, 10**6), (10**6, 1))), "does not fit its storage"),
        "giant shape, stride 0": (with_w_avg(tensor_call((10**6, 10**6), (0, 0))), "does not fit its storage"),
        "shape beyond integers": (with_w_avg(tensor_call((10**5000,), (0,))), "no proper shape"),
        "negative offset": (with_w_avg(tensor_call((4,), (1,), -1)), "no proper shape"),
        "offset outside": (with_w_avg(tensor_call((4,), (1,), 1)), "does not fit"),
        "negative stride": (with_w_avg(tensor_call((2,), (-1,), 2)), "no proper shape"),
        "no numbers": (with_w_avg(tensor_call((0,), (1,))), "does not fit"),
        "storage cut short": (with_w_avg(tensor_call((4,), (1,), storage=load_bytes(cut_storage))), "bytes"),
        "tensor for a storage": (with_w_avg(tensor_call((4,), (1,), storage=[])), "no storage"),
        "a shape of bytes": (with_w_avg(tensor_call(b"12", (1,), storage=floats)), "shape"),
        "one memory many times": ({"G_ema": _buffers(**{f"b{i}": big for i in range(9)})}, "overlap"),
        "module within itself": ({"G_ema": itself}, "contains itself"),
        "dictionary of itself": (cycle, "where a network should be"),
        "modules 30 deep": ({"G_ema": deep}, "deep"), "modules shared": ({"G_ema": wide}, "2000 modules"),
        "list": ([1, 2], "no networks by name"), "number": (7, "no networks by name"),
        "no network": ({"a": 1}, "has no G_ema, only a"), "no state": ({"G_ema": torch.nn.Linear(1, 1)}, "generator"),
        "list for a module": ({"G_ema": [1]}, "where a network should be"),
        "control characters": ({"G_ema": _buffers(**{"\x1b[31m\n": big})}, "proper name"),
        "another architecture": (with_buffer("noise_strength", torch.ones(1)), "noise_strength"),
        "numbers that are not finite": (with_w_avg(torch.full((32,), torch.nan)), "not finite"),
        "another filter": (with_buffer("resample_filter", torch.ones(4, 4)), "resample_filter is not what"),
        "length of 2⁶²": (huge, "damaged"), "memo of 2³²": (b"\x80\x02]r\xff\xff\xff\xff.", "no networks"),
        "memory by repetition": (amplified, "more memory"),
        "tuples 300,000 deep": (b"\x80\x02)" + b"\x85" * 300_000 + b".", "no networks"),
        "a deep key": (b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.", "has no G_ema"),
        "extension registry": (b"\x80\x02\x82\x01.", "EXT1"), "protocol 0's INST": (b"(ios\nsystem\n.", "INST"),
        "persistent id": (b"\x80\x02NQ.", "BINPERSID"), "unknown instruction": (b"\x80\x02\xff.", "damaged"),
        "zip bomb": (bomb, "compressed"), "no zip of ours": (zip_of(b"x", "readme.txt"), "not one of torch.save"),
        "empty": (b"", "at least one"), "text": (b"<html>not found</html>", "damaged"),
    }  # fmt: skip


def _parent(*children):
    module = Module()
    module.state["_modules"] = {f"m{i}": child for i, child in enumerate(children)}
    return module


def _buffers(**tensors):
    module = Module()
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
    whole = write(tmp_path / "whole.pkl", snapshot()[0], how, 4).read_bytes()
    for offset in np.linspace(0, len(whole) - 1, 50).astype(int):
        (tmp_path / "cut.pkl").write_bytes(whole[:offset])
        refused(tmp_path / "cut.pkl", tmp_path / "out")
    assert not canary.exists()


def test_damaged_bytes(tmp_path, canary):
    """Any byte changed: refused in one line, or read as other numbers; never another exception."""
    whole, rng = write(tmp_path / "whole.pkl", snapshot()[0], protocol=4).read_bytes(), random.Random(0)
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
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "posix.system" in result.stderr
    assert not canary.exists() and not (tmp_path / "out").exists()


def python(*args, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environment, **options)


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
    frames[str(count)] = program.module()(inputs["z"], t, noise, inputs["first_anchor"], inputs["psi"])
save_file(frames, "frames.safetensors")
print("\\n".join(operations))
"""


@pytest.mark.slow
def test_export_runs_without_this_package(tmp_path, canary, capsys):
    commands.import_released(write(tmp_path / "snapshot.pkl", snapshot()[0]), tmp_path / "released")
    commands.export(tmp_path / "released", tmp_path / "window.pt2")
    assert "float64 [1, T]" in capsys.readouterr().out
    generator = checkpoint.load(tmp_path / "released")
    t = 1000.5 + 7 * torch.arange(9, dtype=torch.float64)[None]
    noise, first_anchor = motion_noise([3], t, generator.config)
    z, psi = content_latent([3], 32), torch.tensor(0.6)
    save_file(dict(z=z, t=t, noise=noise, first_anchor=first_anchor, psi=psi), tmp_path / "inputs.safetensors")
    result = subprocess.run([sys.executable, "-I", "-c", STRANGER], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for operation in result.stdout.split("\n"):
        assert operation.startswith(("aten.", "<built-in function")) or not operation, operation
    rendered = checkpoint.read_tensors(tmp_path / "frames.safetensors")
    for count in (1, 4, 9):
        expected = to_uint8(generator(z, t[:, :count], noise, first_anchor, psi=0.6)).unflatten(0, (1, count))
        assert rendered[str(count)].shape == expected.shape and rendered[str(count)].dtype == torch.uint8
        difference = (rendered[str(count)].int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert expected.float().std() > 5


def test_the_readmes_use_of_an_export(tmp_path, monkeypatch):
    """Its noise has a row for every anchor that its frames need, and none too many: here 25, anchors 25 to 49."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(golden("generator")[1], motion_distance=4)
    generator = Generator(config).eval().requires_grad_(False)
    export_file(generator, tmp_path / "sky.pt2")
    (snippet,) = [code for code in (ROOT / "README.md").read_text().split("```python\n") if "torch.export.load" in code]
    names = {}
    exec(snippet.partition("```")[0], names)
    noise, first_anchor = motion_noise([0], names["t"], config)
    assert names["noise"].shape == noise.shape == (1, 25, config.motion_noise_dim)
    assert names["first_anchor"] == first_anchor.item()
    expected = generator(names["z"], names["t"], names["noise"], first_anchor, psi=0.8)
    difference = names["frames"][0].int() - to_uint8(expected).int()
    assert names["frames"].shape == (1, 16, 3, 32, 32) and difference.abs().max() <= 1


def test_exports_that_cannot_be(tmp_path):
    state, config = golden("generator")
    generator = direct(state, config)
    for path, clips, word in (("a.bin", 1, ".pt2"), ("no/where.pt2", 1, "not a folder"), ("a.pt2", 0, "--clips")):
        with pytest.raises(UserError, match=word):
            export_file(generator, tmp_path / path, clips)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.pt2").write_text("of value")
    with pytest.raises(UserError, match="there.pt2 is there already: choose another name"):
        export_file(generator, tmp_path / "there.pt2")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["of value"]


def test_show(tmp_path, canary, capsys):
    path = write(tmp_path / "snapshot.pkl", snapshot()[0])
    commands.import_released(path, tmp_path / "released", discriminator=True)
    capsys.readouterr()
    commands.show(tmp_path / "released")
    shown = capsys.readouterr().out
    generator = checkpoint.load(tmp_path / "released")
    for word in (f"{sum(p.numel() for p in generator.parameters()):,}", "imported_from", str(path), "half precision",
                 hashlib.sha256(path.read_bytes()).hexdigest(), "discriminator", "without its training state"):
        assert word in shown, word
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"preset": "tiny", "dataset": "sky", "data": "clips.zip", "seed": 3}')
    judge = Discriminator(generator.config)
    tensors = {f"D.{name}": tensor for name, tensor in judge.state_dict().items()}
    scalars = dict(step=12, frames=288, seconds=3.5, ada_p=0.25)
    checkpoint.save(run, 12, generator.config, generator.state_dict(), tensors, scalars)
    commands.show(run)
    shown = capsys.readouterr().out
    for word in ("checkpoint-000012", "288", "0.25", "clips.zip", "motion_resolutions", "16, 32",
                 hashlib.sha256((run / "checkpoint-000012" / "model.safetensors").read_bytes()).hexdigest()):
        assert word in shown, word
    with pytest.raises(UserError, match="neither a checkpoint"):
        commands.show(tmp_path)
