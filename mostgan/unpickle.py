"""Pickles read without executing anything in them.

A pickle is a program: its opcodes push values, look names up (GLOBAL) and call what they found (REDUCE, NEWOBJ, …),
which is why `pickle.load` of a stranger's file runs the stranger's code. Here nothing is ever looked up, and nothing
called. `pickletools.genops` parses the opcodes, `_run` carries them out on plain data, and a name stays a name.
Tensors become `Tensor`s (what is needed to read one), modules and other objects `Record`s of what the file says of
them, and any name that a network is not made of is refused.

Sizes are bounded by the file's own (`_Budget`), so that a small file can take neither memory nor time without end.
"""

import io
import math
import mmap
import pickletools
import re
import zipfile
from dataclasses import dataclass

import torch

from mostgan.config import UserError

MAX_FILE = 2**33  # bytes; a snapshot of G, D and G_ema at 1024² is about 1 GB
MAX_OPCODES = 2_000_000  # such a snapshot has some 100,000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first of the pickles in a file of torch.save before its zip format
LEGACY_PROTOCOL = 1001

DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_STORAGE = re.compile(r"torch\.(?:cuda\.)?(\w+)Storage")
# Names that may occur as a value, or be called to make a Record. That makes nothing but the Record.
_INERT = re.compile(r"""
    torch\.nn\.modules\.[\w.]+ | torch\.nn\.parameter\.(Parameter|Buffer) | torch\.(Tensor|device)
    | torch\.(b?float|u?int|complex)\d+ | torch\.bool
    | numpy\.(dtype|ndarray|bool_?|(float|u?int)\d+)
    | numpy\._?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)
    | omegaconf\.[\w.]+ | typing\.Any
    | builtins\.(dict|list|tuple|int|long|float|str|bool|object)
""", re.VERBOSE)  # fmt: skip
_PERSISTENCE = re.compile(r"(\w+\.)*persistence\.\w+")  # of the release: rebuilds a class from its embedded source
_DICT = re.compile(r"collections\.(OrderedDict|defaultdict)|(\w+\.)*EasyDict")
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # module names in protocols 0 to 2


class Refused(Exception):
    """The file holds something that it must not; the text says what."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name that the pickle mentions."""

    name: str


@dataclass(eq=False)
class Record:
    """An object of class `name`, as data: the arguments that would make it, and its state."""

    name: str
    args: tuple = ()
    state: object = None


@dataclass(eq=False)
class Storage:
    dtype: torch.dtype
    numel: int
    data: torch.Tensor | None = None  # uint8, until it is read

    def fill(self, raw):
        if len(raw) != self.numel * self.dtype.itemsize:
            raise Refused(f"a tensor's storage has {len(raw)} bytes instead of {self.numel * self.dtype.itemsize}")
        self.data = torch.frombuffer(bytearray(raw), dtype=self.dtype) if raw else torch.empty(0, dtype=self.dtype)


@dataclass(eq=False)
class Tensor:
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self):
        """The torch.Tensor, contiguous and of its own memory. Raises Refused if it reaches out of its storage."""
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
            raise Refused("a tensor has no proper shape")
        if self.storage.data is None:
            raise Refused("a tensor's storage is missing")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        if 0 in self.size or last >= self.storage.numel or math.prod(self.size) > self.storage.numel:
            raise Refused(f"a tensor of shape {self.size} does not fit its storage of {self.storage.numel} numbers")
        return self.storage.data.as_strided(self.size, self.stride, self.offset).clone(
            memory_format=torch.contiguous_format)


@dataclass
class _Budget:
    """What reading a file may still take. The bytes are those copied: each byte of a file becomes, at the most, a bytes
    object and then a storage, so a file that asks for more repeats itself to fill the memory.
    """

    bytes: int
    opcodes: int = MAX_OPCODES
    nested: bool = False  # inside a tensor's own bytes

    def spend(self, bytes=0, opcodes=0):
        self.bytes -= bytes
        self.opcodes -= opcodes
        if self.bytes < 0:
            raise Refused("its tensors ask for more memory than the whole file has bytes")
        if self.opcodes < 0:
            raise Refused(f"it has more than {MAX_OPCODES:,} instructions")


def read(path):
    """What a pickle, or a file of torch.save (zip or the format before it), holds, as data; see the module's docstring.

    Dictionaries keep their entries of plain keys only. Raises UserError on anything else than tensors and inert
    records, and on a damaged file.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE:
        raise UserError(f"{path} has {size:,} bytes: a snapshot has at least one, and at most {MAX_FILE:,}")
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_any(file if mapped[:4] == b"PK\x03\x04" else mapped, _Budget(2 * size + 2**20))
    except Refused as error:
        raise UserError(f"{path} is refused, and nothing in it was executed: {error}") from None
    except Exception as error:  # what a damaged file makes the parsers of pickletools and zipfile run into is anything
        detail = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} is damaged, or no pickle of networks: {ascii(detail)[1:-1]}") from None


def _read_any(file, budget):
    """A zip or legacy file of torch.save, or a plain pickle."""
    if file.read(4) == b"PK\x03\x04":
        return _read_zip(zipfile.ZipFile(file), budget)
    file.seek(0)
    first = _run(file, budget)
    if type(first) is not int or first != LEGACY_MAGIC:
        return first
    protocol, system, storages = _run(file, budget), _run(file, budget), {}
    if protocol != LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("it is no file of torch.save from a little-endian machine")
    result = _run(file, budget, lambda dtype, key, numel: storages.setdefault(key, Storage(dtype, numel)))
    for key in _run(file, budget):
        storage, numel = storages.get(key) if type(key) is str else None, int.from_bytes(file.read(8), "little")
        if storage is None or numel != storage.numel or storage.data is not None:
            raise Refused("the storages it lists are not those it has")
        budget.spend(bytes=numel * storage.dtype.itemsize)
        storage.fill(file.read(numel * storage.dtype.itemsize))
    return result


def _read_zip(archive, budget):
    """A zip file of torch.save: <name>/data.pkl, and the bytes of each storage in <name>/data/<key>."""
    entries, storages = {info.filename: info for info in archive.infolist()}, {}
    budget.spend(opcodes=len(entries))
    roots = [name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(roots) != 1:
        raise Refused("it is a zip file, but not one of torch.save")

    def content(name):
        info = entries[roots[0] + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused("it is compressed, which torch.save never does")
        budget.spend(bytes=info.file_size)
        return archive.read(info)

    def storage_of(dtype, key, numel):
        if key not in storages:
            storages[key] = Storage(dtype, numel)
            storages[key].fill(content(f"data/{key}"))
        return storages[key]

    if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
        raise Refused("it is no file of torch.save from a little-endian machine")
    return _run(io.BytesIO(content("data.pkl")), budget, storage_of)


_VALUES = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split())  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


def _run(file, budget, storage_of=None):
    """Carry out one pickle of the file → its value. storage_of(dtype, key, numel): the Storage that torch.save's
    persistent ids mean.
    """
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(file):
        budget.spend(opcodes=1)
        name = opcode.name
        if name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _COLLECTING:
            first = marks.pop() if _COLLECTING[name] is None else len(stack) - _COLLECTING[name]
            items = stack[first:]
            del stack[first:]
            _collect(name, stack, items)
        elif name == "GLOBAL":
            stack.append(_admit(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_admit(stack[-2], stack[-1])]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_call(budget, stack[-2], stack[-1])]
        elif name == "NEWOBJ_EX":
            stack[-3:] = [_call(budget, stack[-3], stack[-2])]
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Record):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict | Tensor):  # attributes of a dictionary or tensor are not its content
                raise Refused(f"it sets the state of a {type(stack[-1]).__name__}")
        elif name == "BINPERSID" and storage_of is not None:
            stack.append(_persistent(stack.pop(), storage_of))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"it uses the instruction {name}, which no snapshot needs")


# Instructions that take values off the stack and collect them: how many, or None: those since the last mark.
_COLLECTING = {
    "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None, "LIST": None, "DICT": None, "FROZENSET": None, "APPEND": 1,
    "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "ADDITEMS": None, "POP": 1, "POP_MARK": None,
}  # fmt: skip


def _collect(name, stack, items):
    """Push the items as a new collection, or add them to the one on top of the stack."""
    if name.startswith("TUPLE"):
        stack.append(tuple(items))
    elif name == "LIST":
        stack.append(items)
    elif name == "DICT":
        stack.append(_set_items({}, items))
    elif name == "FROZENSET":
        stack.append({item for item in items if _plain(item)})
    elif name.startswith("APPEND") and isinstance(stack[-1], list):
        stack[-1].extend(items)
    elif name.startswith("SETITEM"):
        _set_items(stack[-1], items)
    elif name == "ADDITEMS":
        stack[-1].update(item for item in items if _plain(item))
    elif not name.startswith("POP"):
        raise Refused(f"it appends to a {type(stack[-1]).__name__}")


def _plain(key):
    return key is None or type(key) in (str, int, float, bool, bytes)


def _set_items(target, items):
    """Keys and values, one after the other, into a dictionary. Plain keys only: nothing of a network has another, and
    to hash a deep tuple is to recurse.
    """
    if len(items) % 2:
        raise Refused("it has a key without a value")
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(items[::2], items[1::2]) if _plain(key))
    elif not isinstance(target, Record):
        raise Refused(f"it sets items of a {type(target).__name__}")
    return target


def _admit(module, name):
    """The name as a Global, if snapshots need it. Raises Refused."""
    full = f"{_PYTHON_2.get(_text(module), module)}.{_text(name)}"
    known = full in _CALLS or _storage_dtype(full) is not None
    if known or any(pattern.fullmatch(full) for pattern in (_INERT, _PERSISTENCE, _DICT)):
        return Global(full)
    raise Refused(f"it names {_shown(full)}, and networks need no such thing")


def _call(budget, function, args):
    """What stands for function(*args). Nothing of the pickle's choice is called."""
    if not isinstance(function, Global) or not isinstance(args, tuple):
        raise Refused("it calls what is no function")
    name = function.name
    if name in _CALLS:
        return _CALLS[name](budget, *args)
    if _DICT.fullmatch(name):
        pairs = args[0] if args and isinstance(args[0], list) else []  # as Python 2 wrote it
        budget.spend(opcodes=len(pairs))
        return _set_items({}, [item for pair in pairs for item in _list(pair)])
    if _PERSISTENCE.fullmatch(name):
        (meta,) = args
        if not isinstance(meta, dict) or not {"module_src", "class_name", "state"} <= meta.keys():
            raise Refused(f"it calls {_shown(name)} with something else than a class's source, name and state")
        return Record(_shown(_text(meta["class_name"])), (), meta["state"])  # module_src is left unread
    if _INERT.fullmatch(name):
        return Record(name, args)
    raise Refused(f"it calls {_shown(name)}")


def _persistent(key, storage_of):
    """What torch.save keeps apart: ('storage', type, key, location, numel), in old files followed by a view, which is
    None; and in old files ('module', class, its file, its source), whose source is left unread as well.
    """
    if _list(key)[:1] == ("module",) and isinstance(key[1], Global):
        return key[1]
    kind, type_, key, _, numel, view = (*_list(key), None)[:6]
    dtype = _storage_dtype(type_.name) if isinstance(type_, Global) else None
    if kind != "storage" or dtype is None or type(numel) is not int or numel < 0 or view is not None:
        raise Refused("it refers to something that is no plain storage")
    return storage_of(dtype, _text(key), numel)


def _storage_dtype(name):
    """torch.FloatStorage → torch.float32; None: no storage's name."""
    named = _STORAGE.fullmatch(name)
    return torch.uint8 if name == "torch.storage.UntypedStorage" else named and DTYPES.get(named[1])


def _storage(budget, raw):
    """A storage pickled on its own: the bytes are a torch.save file of it."""
    if budget.nested:
        raise Refused("it has a tensor's storage within a tensor's storage")
    budget.nested = True
    found = _read_any(io.BytesIO(raw), budget)
    budget.nested = False
    if not isinstance(found, Storage):
        raise Refused(f"a tensor's storage holds a {type(found).__name__}")
    return found


def _tensor(budget, storage, offset, size, stride, *_):
    if not isinstance(storage, Storage):
        raise Refused("a tensor has no storage")
    return Tensor(storage, offset, _list(size), _list(stride))


def _parameter(budget, tensor, *_):
    return tensor


def _tensor_with_attributes(budget, function, type_, args, *_):
    if not isinstance(function, Global) or _CALLS.get(function.name) is not _tensor:
        raise Refused("it makes a tensor by what makes none")
    return _tensor(budget, *args)


def _latin1(budget, text, encoding="latin1"):
    """How protocols 0 to 2 write bytes."""
    if encoding not in ("latin1", "latin-1") or type(text) is not str:
        raise Refused("it encodes text otherwise than as pickle itself does")
    budget.spend(bytes=len(text))
    return text.encode("latin1")


def _set(budget, items):
    if not isinstance(items, list):
        raise Refused("it has a set of something else than a list")
    budget.spend(opcodes=len(items))
    return {item for item in items if _plain(item)}


def _list(items):
    """A short sequence, as a tuple: a shape, or the parts of a storage's id."""
    if not isinstance(items, tuple | list) or len(items) > 8:
        raise Refused("it has something else where a shape or a storage should be")
    return tuple(items)


def _text(value):
    if type(value) is not str or len(value) > 1000:
        raise Refused("it has something else where a name should be")
    return value


def _no_bytes(budget):
    return b""


_CALLS = {  # names, and what stands for calling them: called with the budget and the pickle's arguments
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": lambda budget, size=(): _list(size),
    "_codecs.encode": _latin1,
    "builtins.bytes": _no_bytes,
    "builtins.set": _set,
    "builtins.frozenset": _set,
}


def _shown(value):
    """Text from the file, fit to be printed: short, and without control characters."""
    text = ascii(value).strip("'")
    return text if len(text) <= 80 else text[:77] + "..."
