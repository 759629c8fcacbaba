"""Pickles read as data: a restricted `pickle.Unpickler` that resolves no name and runs nothing of
the file.

A pickle may name any function and call it, which is why `pickle.load` of a stranger's file runs the
stranger's code. Here `find_class` admits the names that network snapshots are made of, and gives
for each an inert stand-in: a class whose objects only keep what the file says of them, or, for
tensors, a note of where their numbers lie in the file. Numbers are read when somebody asks for
them, so the optimizers of a snapshot cost neither time nor memory.
"""

import io
import math
import pickle
import pickletools
import re
import secrets
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mostgan.config import UserError

MOST_BYTES = 2**33  # of a file; a snapshot at 1024² has about 2 GB
MOST_INSTRUCTIONS = 2_000_000  # a snapshot has some 400,000
DEEPEST_TUPLE = 100  # the unpickler hashes keys by recursion, which would overflow the C stack
LARGE = (
    2**16
)  # bytes; longer strings lie outside of pickle's frames, and are noted rather than read
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

    def __init__(self, *args):
        super().__init__(args[0] if args and isinstance(args[0], list | dict) else ())

    def __setstate__(self, state):
        pass  # attributes of a dictionary are not its content


class Function:
    """Stands for a function that a pickle may call. Its attributes cannot be set from the file."""

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)

    def __setstate__(self, state):
        raise Refused("it sets the state of a function")


@dataclass(eq=False)
class Storage:
    """Numbers in the file: `numel` of dtype, to be had from read_into(buffer)."""

    dtype: torch.dtype
    numel: int
    budget: "Budget"
    read_into: object = None

    def __setstate__(self, state):
        raise Refused("it sets the state of a tensor's storage")

    def read(self):
        """The numbers, in one dimension."""
        if self.read_into is None:
            raise Refused("a tensor's storage is missing")
        self.budget.spend(bytes=self.numel * self.dtype.itemsize)
        numbers = torch.empty(self.numel, dtype=self.dtype)
        buffer = memoryview(numbers.view(torch.uint8).numpy())
        if self.numel and self.read_into(buffer) != len(buffer):
            raise Refused("a tensor's storage is cut short")
        return numbers


@dataclass(eq=False)
class Tensor:
    """A view of a storage. Hashable, for optimizers have parameters as keys."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state):
        pass  # attributes of a tensor are not its content

    def check(self):
        """Raise Refused if the view reaches out of its storage."""
        numbers, room = (self.offset, *self.size, *self.stride), self.storage.numel
        whole = all(type(n) is int and 0 <= n < 2**62 for n in numbers)
        if not whole or len(self.size) != len(self.stride):
            raise Refused("a tensor has no proper shape")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        if (
            0 not in self.size
            and (last >= room or math.prod(self.size) > room)
            or self.offset > room
        ):
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
        of_storage.setdefault(id(tensor.storage), []).append(name)
    room = SHARED + sum(tensors[names[0]].storage.numel for names in of_storage.values())
    if sum(math.prod(tensor.size) for tensor in tensors.values()) > room:
        raise Refused("its tensors overlap, and are together far more than the file holds")
    read = {}
    for names in of_storage.values():
        numbers = tensors[names[0]].storage.read()
        for name in names:
            of = tensors[name]
            view = numbers.as_strided(of.size, of.stride, of.offset)
            whole = len(names) == 1 and view.numel() == numbers.numel() and view.is_contiguous()
            read[name] = view if whole else view.clone(memory_format=torch.contiguous_format)
    return {name: read[name] for name in tensors}


# ------------------------------------------------------------------------------------- reading


@dataclass
class Budget:
    """What reading a file may still take: bytes that are copied, and instructions of its
    pickles.
    """

    bytes: int
    instructions: int = MOST_INSTRUCTIONS
    nested: bool = False  # inside a tensor's own bytes

    def spend(self, bytes=0, instructions=0):
        self.bytes -= bytes
        self.instructions -= instructions
        if self.bytes < 0:
            raise Refused("its tensors ask for more memory than the whole file has bytes")
        if self.instructions < 0:
            raise Refused(f"it has more than {MOST_INSTRUCTIONS:,} instructions")


class Source:
    """A stretch of a file, as pickle reads it. Long byte strings are noted and passed over (see
    `readinto`).
    """

    def __init__(self, file, start, end):
        self.file, self.at, self.end = file, start, end
        self.token, self.noted, self.skimming = secrets.token_bytes(16), [], False

    def tell(self):
        return self.at

    def _next(self, count):
        count = min(count, self.end - self.at)
        self.file.seek(self.at)
        self.at += count
        return count

    def read(self, count):
        if self.skimming and LARGE <= count <= self.end - self.at:
            self.at += count
            return bytes(count)  # only its length is looked at
        return self.file.read(self._next(count))

    def readline(self):
        self.file.seek(self.at)
        line = self.file.readline(self.end - self.at)
        self.at += len(line)
        return line

    def readinto(self, buffer):
        """Fill the buffer; or, if it is for a long byte string, only note where that string lies in
        the file.

        The unpickler has made an uninitialized byte string, and keeps it to the end. What is not
        written to takes no memory; `bytes_at` knows such a string by the token at its beginning.
        """
        if len(buffer) < LARGE:
            return self.file.readinto(memoryview(buffer)[: self._next(len(buffer))])
        start, count = self.at, self._next(len(buffer))
        head = self.token + len(self.noted).to_bytes(8, "little")
        buffer[: len(head)] = head
        self.noted.append((start, start + count))
        return count

    def bytes_at(self, raw):
        """A byte string that the unpickler handed on → the Source of its bytes."""
        if raw[:16] == self.token and len(raw) >= LARGE:
            return Source(self.file, *self.noted[int.from_bytes(raw[16:24], "little")])
        return Source(io.BytesIO(raw), 0, len(raw))

    def numbers(self, start, count):
        """A function that reads `count` bytes from `start` on into a buffer."""
        if start + count > self.end:
            raise Refused("a tensor's storage is cut short")

        def read_into(buffer):
            self.file.seek(start)
            return self.file.readinto(buffer)

        return read_into


@contextmanager
def opened(path):
    """What a pickle, or a file of torch.save (zip or the format before it), holds, as data; see the
    module's docstring.

    Tensors can be read while it is open. Raises UserError on anything else than tensors and inert
    objects, and on a damaged file; also for what is Refused inside the `with` statement.
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
            try:
                value = _read_any(Source(file, 0, size), Budget(2 * size + 2**20))
            except (Refused, MemoryError, OSError):
                raise
            except Exception as error:  # a damaged file makes pickle and zipfile run into anything
                detail = ascii(str(error).partition("\n")[0][:200] or type(error).__name__)[1:-1]
                raise UserError(f"{path} is damaged, or no pickle of networks: {detail}") from None
            yield value
        except Refused as error:
            raise UserError(f"{path} is refused, and nothing in it was executed: {error}") from None
        except MemoryError:
            raise UserError(f"{path} asks for more memory than there is") from None


def _read_any(source, budget):
    """A zip or legacy file of torch.save, or a plain pickle."""
    start = source.at
    if source.read(4) == b"PK\x03\x04":
        return _read_zip(source, start, budget)
    source.at = start
    first = _load(source, budget)
    if type(first) is not int or first != LEGACY_MAGIC:
        return first
    protocol, system, storages = _load(source, budget), _load(source, budget), {}
    little = isinstance(system, dict) and system.get("little_endian") is True
    if protocol != LEGACY_PROTOCOL or not little:
        raise Refused("it is no file of torch.save from a little-endian machine")

    def storage_of(dtype, key, numel):
        return storages.setdefault(key, Storage(dtype, numel, budget))

    value = _load(source, budget, storage_of)
    for key in _load(source, budget):
        storage = storages.get(key) if type(key) is str else None
        numel = int.from_bytes(source.read(8), "little")
        if storage is None or numel != storage.numel or storage.read_into is not None:
            raise Refused("the storages it lists are not those it has")
        count = numel * storage.dtype.itemsize
        storage.read_into = source.numbers(source.at, count)
        source.at += count
    return value


def _read_zip(source, start, budget):
    """A zip file of torch.save: <name>/data.pkl, and the bytes of each storage in
    <name>/data/<key>.
    """
    if isinstance(source.file, io.BytesIO):
        file = source.file
    elif (start, source.end) == (0, source.file.seek(0, 2)):
        file = source.file
    else:  # a storage within a pickle
        budget.spend(bytes=source.end - start)
        source.file.seek(start)
        file = io.BytesIO(source.file.read(source.end - start))
    archive = zipfile.ZipFile(file)
    entries, storages = {info.filename: info for info in archive.infolist()}, {}
    budget.spend(instructions=len(entries))
    roots = [
        name.removesuffix("data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)
    ]
    if len(roots) != 1:
        raise Refused("it is a zip file, but not one of torch.save")

    def entry(name):
        info = entries[roots[0] + name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused("it is compressed, which torch.save never does")
        return info

    def content(name):
        budget.spend(bytes=entry(name).file_size)
        return archive.read(entry(name))

    def storage_of(dtype, key, numel):
        if key not in storages:
            info = entry(f"data/{key}")
            if info.file_size != numel * dtype.itemsize:
                raise Refused(
                    f"a tensor's storage has {info.file_size} bytes, not {numel * dtype.itemsize}"
                )
            storages[key] = Storage(
                dtype, numel, budget, lambda buffer: _read_entry(archive, info, buffer)
            )
        return storages[key]

    if roots[0] + "byteorder" in entries and content("byteorder") != b"little":
        raise Refused("it is no file of torch.save from a little-endian machine")
    pickled = content("data.pkl")
    return _load(Source(io.BytesIO(pickled), 0, len(pickled)), budget, storage_of)


def _read_entry(archive, info, buffer):
    done = 0
    try:
        with archive.open(info) as file:
            while done < len(buffer) and (count := file.readinto(buffer[done : done + 2**20])):
                done += count
    except Exception as error:  # zipfile has no one kind of error for damage
        detail = ascii(str(error))[1:-1][:100]
        raise Refused(f"an entry of the zip file is damaged: {detail}") from None
    return done


def _load(source, budget, storage_of=None):
    """The next pickle of the source → its value. storage_of(dtype, key, numel): what torch.save's
    ids mean.
    """
    start, source.skimming = source.at, True
    survey(source, budget)
    end, source.at, source.skimming = source.at, start, False
    value = SafeUnpickler(source, budget, storage_of).load()
    source.at = end
    return value


def survey(source, budget):
    """Look through a pickle's instructions before any is carried out, for what could exhaust the
    unpickler itself.

    That is their number, memo indices that are not in use (it has an array of them), and tuples in
    tuples. Raises Refused on these, and IndexError, KeyError or ValueError on a damaged pickle.
    """
    stack, memo, count = [], {}, 0  # the stack holds how deep a tuple each value is; None is a mark
    for opcode, arg, _ in pickletools.genops(source):
        budget.spend(instructions=1)
        count += 1
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if name == "MEMOIZE" else arg
            if index > count:
                raise Refused("it numbers what it remembers otherwise than pickle does")
            memo[index] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(None)
        else:
            taken = _taken(stack, opcode.stack_before)
            depth = 1 + max((d for d in taken if d), default=0) if name.startswith("TUPLE") else 0
            if depth > DEEPEST_TUPLE:
                raise Refused(f"it has tuples more than {DEEPEST_TUPLE} deep")
            stack += [depth] * len(opcode.stack_after)


def _taken(stack, before):
    """Take off the stack what an instruction takes; before: its `stack_before` of pickletools."""
    count, taken = len(before), []
    if pickletools.stackslice in before:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        count -= 2
    return taken + [stack.pop() for _ in range(count)]


# ------------------------------------------------------------------------------- the unpickler


class SafeUnpickler(pickle.Unpickler):
    """Unpickles to stand-ins; see the module's docstring."""

    def __init__(self, source, budget, storage_of):
        super().__init__(source)
        self.source, self.budget, self.storage_of, self.classes = source, budget, storage_of, {}
        tensor = Function(_tensor)
        self.functions = {
            "torch._utils._rebuild_tensor": tensor,
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": Function(_parameter),
            "torch._utils._rebuild_parameter_with_state": Function(_parameter),
            "torch._tensor._rebuild_from_type_v2": Function(
                lambda made, type_, args, *_: _tensor_of(made, tensor, args)
            ),
            "torch.storage._load_from_bytes": Function(self.storage_from_bytes),
            "torch.Size": Function(lambda size=(): _numbers(size)),
            "copyreg._reconstructor": Function(_reconstructed),
            "_codecs.encode": Function(self.encoded),
            "builtins.bytes": Function(lambda: b""),
            "builtins.bytearray": Function(lambda raw=b"": raw),
            "builtins.set": Function(_set),
            "builtins.frozenset": Function(_set),
        }

    def find_class(self, module, name):
        """The stand-in for a name. Raises Refused for a name that snapshots do not need."""
        full = f"{PYTHON_2.get(module, module)}.{name}"
        if full in self.functions:
            return self.functions[full]
        if storage_dtype(full) is not None:
            return self._class(full, Inert)
        if PERSISTENT.fullmatch(full):
            return Function(self.persistent_object)
        if DICTIONARY.fullmatch(full):
            return self._class(full, Dictionary)
        if INERT.fullmatch(full):
            return self._class(full, Inert)
        raise Refused(f"it names {shown(full)}, and networks need no such thing")

    def _class(self, full, base):
        if full not in self.classes:  # made for this file alone: what it does to one ends with it
            self.classes[full] = type(base.__name__, (base,), {"name": full})
        return self.classes[full]

    def persistent_object(self, meta):
        """The release's call that would rebuild a class from its source text, which is left
        unread.
        """
        if not isinstance(meta, dict) or not {"module_src", "class_name", "state"} <= meta.keys():
            raise Refused("it rebuilds a class from something else than its source, name and state")
        if type(meta["class_name"]) is not str:
            raise Refused("it has a class without a name")
        made = Inert()
        made.name, made.state = shown(meta["class_name"]), meta["state"]
        return made

    def storage_from_bytes(self, raw):
        """A storage that was pickled on its own: the bytes are a torch.save file of it."""
        if self.budget.nested or type(raw) is not bytes:
            raise Refused("it has a tensor's storage in a tensor's storage, or nothing of the kind")
        self.budget.nested = True
        found = _read_any(self.source.bytes_at(raw), self.budget)
        self.budget.nested = False
        if not isinstance(found, Storage):
            raise Refused(f"a tensor's storage holds a {type(found).__name__}")
        return found

    def encoded(self, text, encoding="latin1"):
        """How protocols 0 to 2 write bytes."""
        if encoding not in ("latin1", "latin-1") or type(text) is not str:
            raise Refused("it encodes text otherwise than as pickle itself does")
        self.budget.spend(bytes=len(text))
        return text.encode("latin1")

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


def _tensor(storage, offset, size, stride, *_):
    if not isinstance(storage, Storage):
        raise Refused("a tensor has no storage")
    return Tensor(storage, offset, _numbers(size), _numbers(stride))


def _parameter(tensor, *_):
    if not isinstance(tensor, Tensor):
        raise Refused("a parameter is no tensor")
    return tensor


def _tensor_of(made, tensor, args):
    """A tensor with attributes, which are left out."""
    if made is not tensor or not isinstance(args, tuple):
        raise Refused("it makes a tensor by what makes none")
    return _tensor(*args)


def _reconstructed(cls, base=None, state=None):
    """How protocols 0 and 1 make an object."""
    if not isinstance(cls, type) or not issubclass(cls, Inert | Dictionary):
        raise Refused("it makes an object of what is no class")
    return cls(state) if issubclass(cls, Dictionary) else cls()


def _set(items=()):
    if not isinstance(items, list | tuple):
        raise Refused("it has a set of something else than a list")
    return set(items)


def _numbers(size):
    """A shape, as a tuple of whole numbers."""
    if not isinstance(size, tuple | list) or len(size) > 8 or any(type(n) is not int for n in size):
        raise Refused("it has something else where a tensor's shape should be")
    return tuple(size)


def storage_dtype(name):
    """torch.FloatStorage → torch.float32; None: no storage's name."""
    if name == "torch.storage.UntypedStorage":
        return torch.uint8
    named = STORAGE.fullmatch(name)
    return named and DTYPES.get(named[1])


def shown(value):
    """Text from the file, fit to be printed: short, and without control characters."""
    text = ascii(str(value)).strip("'")
    return text if len(text) <= 80 else text[:77] + "..."
