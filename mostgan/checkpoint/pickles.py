"""Pickles read as data: an unpickler that resolves no name and runs nothing of the file.

A pickle may name any function and call it, which is why `pickle.load` of a stranger's file runs the
stranger's code. Here `find_class` admits the names that network snapshots are made of, and gives
for each an inert stand-in: a class whose objects only keep what the file says of them, or, for
tensors, a note of where their numbers lie in the file. Numbers are read when somebody asks for
them, so the optimizers of a snapshot cost neither time nor memory.

The base is `pickle._Unpickler`, the standard library's unpickler in Python. Unlike the one in C it
keeps what it remembers in a dictionary, whatever indices a file chooses, and its instructions are a
table, in which a few are replaced here.
"""

import functools
import io
import math
import pickle
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mostgan.config import UserError

MOST_BYTES = 2**33  # of a file; a snapshot at 1024² has about 2 GB
MOST_READS = 3_000_000  # steps of reading pickles; a snapshot takes some 100,000
SHARED = 2**22  # numbers that tensors may have beyond those of their storages: shared filters
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch.save from before its zip format
LEGACY_PROTOCOL = 1001

DTYPES = {"Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32}
DTYPES |= {"Double": torch.float64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16}
DTYPES |= {"Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}
STORAGE = re.compile(r"torch\.(?:cuda\.)?(\w+)Storage")
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # module names in protocols 0 to 2
INERT = re.compile(
    r"""
    torch\.nn\.modules\.[\w.]+ | torch\.nn\.parameter\.(Parameter|Buffer) | torch\.(Tensor|device)
    | torch\.(b?float|u?int|complex)\d+ | torch\.bool | torch\.optim\.\w+\.\w+
    | numpy\.(dtype|ndarray|bool_?|(float|u?int)\d+)
    | numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)
    | omegaconf\.[\w.]+ | typing\.Any | (src\.)?training\.\w+\.\w+
    | builtins\.(dict|list|tuple|int|long|float|complex|str|bool|object|slice)
    """,
    re.VERBOSE,
)
DICTIONARY = re.compile(r"collections\.(OrderedDict|defaultdict)|(\w+\.)*EasyDict")
PERSISTENT = re.compile(r"(\w+\.)*persistence\._reconstruct_persistent_obj")


class Refused(Exception):
    """The file holds something that it must not; the text says what."""


@dataclass
class Budget:
    """What reading a file may still take: bytes that are copied, and steps of its pickles."""

    bytes: int
    reads: int = MOST_READS

    def spend(self, bytes=0, reads=0):
        self.bytes -= bytes
        self.reads -= reads
        if self.bytes < 0:
            raise Refused("its tensors ask for more memory than the whole file has bytes")
        if self.reads < 0:
            raise Refused(f"its pickles take more than {MOST_READS:,} steps")


# ----------------------------------------------------------------------------------- stand-ins


class Inert:
    """An object as data: the name of its class, the arguments that would make it, and its state."""

    name = ""

    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass  # entries of an object that is no plain dictionary: nothing of a network

    def append(self, item):
        pass


class Dictionary(dict):
    """Stands for a dictionary of another class. It can be a key, as everything here can."""

    __hash__ = object.__hash__

    def __init__(self, items=(), *_):
        items = items if isinstance(items, list | dict) else ()  # else a defaultdict's default
        self.budget.spend(reads=len(items))
        super().__init__(items)

    def __setstate__(self, state):
        pass  # attributes of a dictionary are not its content


class Tuple(tuple):
    """A tuple whose hash is its identity. To hash tuples within tuples takes time without bound if
    they share their parts, and without it overflows the stack if they are deep enough.
    """

    __slots__ = ()
    __hash__ = object.__hash__


class Fixed:
    """The base of stand-ins that a file cannot change."""

    def __setstate__(self, state):
        raise Refused(f"it sets the state of a {type(self).__name__.lower()}")


class Function(Fixed):
    """Stands for a function that a pickle may call."""

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)


class Source(Fixed):
    """A stretch of a file, as pickle reads it. It also stands for a string of bytes in a pickle,
    which is read when it is needed.
    """

    def __init__(self, file, start, end, budget):
        self.file, self.at, self.end, self.budget = file, start, end, budget

    def read(self, count):
        """The next bytes. Raises EOFError if there are not so many."""
        return self.part(count).rest()

    def rest(self):
        """All bytes that are left."""
        self.file.seek(self.at)
        return self.file.read(self.end - self.at)

    def part(self, count):
        """The next bytes, as a Source."""
        self.budget.spend(reads=1)
        if count > self.end - self.at:
            raise EOFError("it is cut short")
        self.at += count
        return Source(self.file, self.at - count, self.at, self.budget)

    def readline(self):
        self.budget.spend(reads=1)
        self.file.seek(self.at)
        line = self.file.readline(self.end - self.at)
        self.at += len(line)
        return line


@dataclass(eq=False)
class Storage(Fixed):
    """Numbers in the file: `numel` of dtype. read_bytes() gives them, and is None for a storage
    that a file names and does not have.
    """

    dtype: torch.dtype
    numel: int
    budget: Budget
    read_bytes: Any = None

    @property
    def opened(self):
        return self

    def read(self):
        """The numbers, in one dimension."""
        self.budget.spend(bytes=self.numel * self.dtype.itemsize)
        if self.read_bytes is None:
            raise Refused("a tensor's storage is missing")
        numbers = bytearray(self.read_bytes())
        if len(numbers) != self.numel * self.dtype.itemsize:
            raise Refused("a tensor's storage is cut short")
        return torch.frombuffer(numbers, dtype=self.dtype) if numbers else torch.empty(0)


class PackedStorage(Fixed):
    """A storage that was pickled on its own, as the bytes of a torch.save file of it."""

    def __init__(self, source):
        self.source = source

    @functools.cached_property
    def opened(self):
        """The Storage in it."""
        of = self.source  # which other storages of a hostile file may have as well
        found = _read_any(Source(of.file, of.at, of.end, of.budget), whole=False)
        if not isinstance(found, Storage):
            raise Refused(f"a tensor's storage holds a {type(found).__name__}")
        return found


@dataclass(eq=False)
class Tensor:
    """A view of a storage. Hashable, for optimizers have parameters as keys."""

    storage: Storage | PackedStorage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state):
        pass  # attributes of a tensor are not its content

    def check(self):
        """Raise Refused if the view reaches out of its storage."""
        numbers, room = (self.offset, *self.size, *self.stride), self.storage.opened.numel
        whole = all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        if not whole or len(self.size) != len(self.stride):
            raise Refused("a tensor has no proper shape")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        inside = 0 in self.size or last < room and math.prod(self.size) <= room
        if not inside or self.offset > room:
            raise Refused(
                f"a tensor of shape {self.size} does not fit its storage of {room} numbers"
            )


def read_tensors(tensors):
    """{name: Tensor} → {name: torch.Tensor}, contiguous. Each storage is read once, and let go
    before the next.

    Raises Refused if a view reaches out of its storage, or if the views together are more than
    their storages.
    """
    of_storage = {}
    for name, tensor in tensors.items():
        tensor.check()
        of_storage.setdefault(tensor.storage.opened, []).append(name)
    room = SHARED + sum(storage.numel for storage in of_storage)
    if sum(math.prod(tensor.size) for tensor in tensors.values()) > room:
        raise Refused("its tensors overlap, and are together far more than the file holds")
    read = {}
    for storage, names in of_storage.items():
        numbers = storage.read()
        for name in names:
            of = tensors[name]
            view = numbers.as_strided(of.size, of.stride, of.offset)
            whole = len(names) == 1 and view.numel() == numbers.numel() and view.is_contiguous()
            read[name] = view if whole else view.clone(memory_format=torch.contiguous_format)
    return {name: read[name] for name in tensors}


# ------------------------------------------------------------------------------------- reading


@contextmanager
def opened(path):
    """What a pickle, or a file of torch.save (zip or the format before it), holds, as data; see the
    module's docstring.

    Tensors can be read while it is open. Raises UserError on anything else than tensors and inert
    objects, and on a damaged file; also for what goes wrong inside the `with` statement.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    size = path.stat().st_size
    if not 0 < size <= MOST_BYTES:
        raise UserError(
            f"{path} has {size:,} bytes: a snapshot has at least one, and at most {MOST_BYTES:,}"
        )
    with open(path, "rb") as file:
        try:
            yield _read_any(Source(file, 0, size, Budget(2 * size + 2**20)))
        except (UserError, OSError):
            raise
        except Refused as error:
            raise UserError(f"{path} is refused, and nothing in it was executed: {error}") from None
        except MemoryError:
            raise UserError(f"{path} asks for more memory than there is") from None
        except Exception as error:  # a damaged file makes pickle and zipfile run into anything
            detail = ascii(str(error).partition("\n")[0][:200] or type(error).__name__)[1:-1]
            raise UserError(f"{path} is damaged, or no pickle of networks: {detail}") from None


def _read_any(source, whole=True):
    """A zip or legacy file of torch.save, or a plain pickle. whole: the source is a whole file."""
    start, head = source.at, source.read(4)
    source.at = start
    if head == b"PK\x03\x04":
        return _read_zip(source, whole)
    first = SafeUnpickler(source).load()
    if type(first) is not int or first != LEGACY_MAGIC:
        return first
    protocol, system = SafeUnpickler(source).load(), SafeUnpickler(source).load()
    little = isinstance(system, dict) and system.get("little_endian") is True
    if protocol != LEGACY_PROTOCOL or not little:
        raise Refused("it is no file of torch.save from a little-endian machine")
    storages = {}

    def storage_of(dtype, key, numel):
        return storages.setdefault(key, Storage(dtype, numel, source.budget))

    value = SafeUnpickler(source, storage_of).load()
    for key in SafeUnpickler(source).load():
        storage = storages.get(key) if type(key) is str else None
        numel = int.from_bytes(source.read(8), "little")
        if storage is None or numel != storage.numel or storage.read_bytes is not None:
            raise Refused("the storages it lists are not those it has")
        storage.read_bytes = source.part(numel * storage.dtype.itemsize).rest
    return value


def _read_zip(source, whole):
    """A zip file of torch.save: <name>/data.pkl, and the bytes of each storage in
    <name>/data/<key>.
    """
    archive = zipfile.ZipFile(source.file if whole else io.BytesIO(source.rest()))
    entries, storages = {info.filename: info for info in archive.infolist()}, {}
    roots = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise Refused("it is a zip file, but not one of torch.save")
    root = roots[0].removesuffix("data.pkl")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise Refused("it is compressed, which torch.save never does")

    def storage_of(dtype, key, numel):
        info = entries[f"{root}data/{key}"]
        if info.file_size != numel * dtype.itemsize:
            raise Refused(
                f"a tensor's storage has {info.file_size} bytes, not {numel * dtype.itemsize}"
            )
        read_bytes = functools.partial(archive.read, info)
        return storages.setdefault(key, Storage(dtype, numel, source.budget, read_bytes))

    if root + "byteorder" in entries and archive.read(root + "byteorder") != b"little":
        raise Refused("it is no file of torch.save from a little-endian machine")
    pickled = archive.read(roots[0])
    source.budget.spend(bytes=len(pickled))
    inside = Source(io.BytesIO(pickled), 0, len(pickled), source.budget)
    return SafeUnpickler(inside, storage_of).load()


# ------------------------------------------------------------------------------- the unpickler


def _load_frame(unpickler):
    unpickler.read(8)  # how many bytes to fetch at a time is up to us


def _load_bytes(unpickler, width):
    """A string of bytes, after its length in so many bytes."""
    count = int.from_bytes(unpickler.read(width), "little")
    unpickler.append(unpickler.source.part(count))


def _load_tuple(unpickler, load):
    load(unpickler)
    unpickler.stack[-1] = Tuple(unpickler.stack[-1])


def _instructions():
    """The standard table of instructions with ours in it, and without the extension registry's,
    which would find what another unpickler has found before.
    """
    table = dict(pickle._Unpickler.dispatch)
    for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del table[code[0]]
    for code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        table[code[0]] = functools.partial(_load_tuple, load=table[code[0]])
    for code, width in ((pickle.BINBYTES, 4), (pickle.BINBYTES8, 8), (pickle.BYTEARRAY8, 8)):
        table[code[0]] = functools.partial(_load_bytes, width=width)
    return table | {pickle.FRAME[0]: _load_frame}


class SafeUnpickler(pickle._Unpickler):
    """Unpickles to stand-ins; see the module's docstring. storage_of(dtype, key, numel): what
    torch.save's references to storages mean.
    """

    dispatch = _instructions()

    def __init__(self, source, storage_of=None):
        super().__init__(source)
        self.source, self.storage_of, self.classes = source, storage_of, {}

    def find_class(self, module, name):
        """The stand-in for a name. Raises Refused for a name that snapshots do not need."""
        full = f"{PYTHON_2.get(module, module)}.{name}"
        budget = self.source.budget
        if full in FUNCTIONS:
            return Function(functools.partial(FUNCTIONS[full], budget))
        if PERSISTENT.fullmatch(full):
            return Function(functools.partial(_persistent_object, budget))
        base = Dictionary if DICTIONARY.fullmatch(full) else Inert
        if base is Dictionary or INERT.fullmatch(full) or storage_dtype(full) is not None:
            if full not in self.classes:  # made for this file alone, so that it cannot spoil others
                self.classes[full] = type(base.__name__, (base,), {"name": full, "budget": budget})
            return self.classes[full]
        raise Refused(f"it names {shown(full)}, and networks need no such thing")

    def persistent_load(self, key):
        """What torch.save keeps apart: ('storage', type, key, location, numel), in old files
        followed by a view, which is None; and in old files ('module', class, its file, its source),
        whose source is left unread. The location, such as cuda:0, is of no concern.
        """
        if self.storage_of is None or not isinstance(key, tuple):
            raise Refused("it refers to something outside of itself")
        if len(key) == 4 and key[0] == "module":
            return key[1]
        kind, type_, name, _, numel, view = (*key, None, None, None, None, None, None)[:6]
        dtype = storage_dtype(getattr(type_, "name", "")) if isinstance(type_, type) else None
        plain = kind == "storage" and type(name) is str and view is None and dtype is not None
        if not plain or type(numel) is not int or not 0 <= numel < 2**40:
            raise Refused("it refers to something that is no plain storage")
        return self.storage_of(dtype, name, numel)


# What stands for each function that a snapshot calls. The first argument is the Budget.


def _persistent_object(budget, meta):
    """The release's call that would rebuild a class from its source text, which is left unread."""
    if not isinstance(meta, dict) or not {"module_src", "class_name", "state"} <= meta.keys():
        raise Refused("it rebuilds a class from something else than its source, name and state")
    if type(meta["class_name"]) is not str:
        raise Refused("it has a class without a name")
    made = Inert()
    made.name, made.state = shown(meta["class_name"]), meta["state"]
    return made


def _set(budget, items=()):
    if not isinstance(items, list | tuple):
        raise Refused("it has a set of something else than a list")
    budget.spend(reads=len(items))
    return set(items)


def _encoded(budget, text, encoding="latin1"):
    """How protocols 0 to 2 write bytes."""
    if encoding not in ("latin1", "latin-1") or type(text) is not str:
        raise Refused("it encodes text otherwise than as pickle itself does")
    budget.spend(bytes=len(text))
    return text.encode("latin1")


def _reconstructed(budget, cls, base=None, state=None):
    """How protocols 0 and 1 make an object."""
    if not isinstance(cls, type) or not issubclass(cls, Inert | Dictionary):
        raise Refused("it makes an object of what is no class")
    return cls(state) if issubclass(cls, Dictionary) else cls()


def _storage(budget, raw):
    """A storage that was pickled on its own."""
    if type(raw) is bytes:
        raw = Source(io.BytesIO(raw), 0, len(raw), budget)
    if not isinstance(raw, Source):
        raise Refused("it makes a tensor's storage of something else than bytes")
    return PackedStorage(raw)


def _tensor(budget, storage, offset, size, stride, *_):
    if not isinstance(storage, Storage | PackedStorage):
        raise Refused("a tensor has no storage")
    return Tensor(storage, offset, _numbers(budget, size), _numbers(budget, stride))


def _parameter(budget, tensor, *_):
    if not isinstance(tensor, Tensor):
        raise Refused("a parameter is no tensor")
    return tensor


def _tensor_of(budget, made, type_, args, *_):
    """A tensor with attributes, which are left out."""
    if not isinstance(made, Function) or not isinstance(args, tuple):
        raise Refused("it makes a tensor by what makes none")
    return _parameter(budget, made(*args))


def _numbers(budget, size=()):
    """A shape, as a tuple of whole numbers."""
    if not isinstance(size, tuple | list) or len(size) > 8 or any(type(n) is not int for n in size):
        raise Refused("it has something else where a tensor's shape should be")
    return tuple(size)


FUNCTIONS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": _numbers,
    "copyreg._reconstructor": _reconstructed,
    "_codecs.encode": _encoded,
    "builtins.bytes": lambda budget: b"",
    "builtins.bytearray": lambda budget, raw=b"": raw,
    "builtins.set": _set,
    "builtins.frozenset": _set,
}


def storage_dtype(name):
    """torch.FloatStorage → torch.float32; None: no storage's name."""
    if name == "torch.storage.UntypedStorage":
        return torch.uint8
    named = STORAGE.fullmatch(name)
    return named and DTYPES.get(named[1])


def shown(value):
    """A value of the file, fit to be printed: short, and without control characters. Of a container
    it is the type alone: what is in it may take time without bound to print.
    """
    plain = value is None or isinstance(value, str | int | float)
    text = ascii(str(value) if plain else type(value).__name__).strip("'")
    return text if len(text) <= 80 else text[:77] + "..."
