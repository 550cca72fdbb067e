"""The one reader of checkpoints, made for files of strangers.

A torch checkpoint is a zip of a pickle and of raw numbers. torch.load may run whatever the pickle names, torch.jit.load
a program beside it: neither gets a file. _Reader works the few instructions that plain data and tensors need. Classes
and functions are but names to it; objects of trainers (Lightning, OmegaConf ...) become inert, nothing is imported.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import mmap
import os
import pathlib
import pickletools
import re
import zipfile
import zlib

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from ldm import ModelError

LARGE = 2**28  # bytes from which on a file is mapped, not read, and its sums are left to the download
PICKLE_BYTES, PICKLE_STEPS, ITEMS, DEPTH = 2**24, 1_000_000, 1_000_000, 64  # the most that a pickle may have
TABLE = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()
_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
_DTYPES = {f"torch.{s}Storage": getattr(torch, d) for s, d in zip(_STORAGES, _DTYPES)}
# names that checkpoints have; one with any other is refused
_NAMES = re.compile(
    r"(pytorch_lightning|lightning\w*|omegaconf|transformers|ldm|numpy|argparse|pathlib|typing|collections|_codecs"
    r"|__torch__|torch\.nn|torch\.jit\._pickle)\..+"
    r"|torch\.(\w+Storage|Size|device|_utils\._rebuild_(tensor|tensor_v2|parameter)|_tensor\._rebuild_from_type_v2)"
    r"|(builtins|__builtin__)\.(set|frozenset|dict|list|tuple|int|float|bool|str|bytearray|complex|slice)"
)
# the instructions of pickle that checkpoints have: how many values they take from the stack (None: all since the mark)
_LITERALS = set("BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES".split())
_MAKES = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set, "NONE": lambda: None}
_MAKES.update(NEWTRUE=lambda: True, NEWFALSE=lambda: False)
_TUPLES = {"TUPLE": None, "EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_FILLS = {"APPEND": 1, "APPENDS": None, "SETITEM": 2, "SETITEMS": None, "ADDITEMS": None}
_CALLS = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}
_TAKES = {**_TUPLES, **_FILLS, **_CALLS, "STACK_GLOBAL": 2, "BINPERSID": 1, "BUILD": 1, "POP": 1, "STOP": 1}
_MEMO = set("BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET".split())
_KNOWN = {"GLOBAL", "MARK", "PROTO", "FRAME", *_LITERALS, *_MAKES, *_TAKES, *_MEMO}


class Refusal(Exception):
    """What an honest checkpoint would not hold."""


class Inert:
    """Stands for a class or function, or an object of one: keeps its name and state, does nothing."""

    def __init__(self, name):
        self.name, self.state = name, None


class StoredTensor:
    """A tensor that is still in its file; load() reads it."""

    def __init__(self, tensor, release=lambda: None):
        self.tensor, self.dtype, self.shape, self.release = tensor, tensor.dtype, tuple(tensor.shape), release

    def load(self, device="cpu", dtype=None, channels_last=False):
        """The tensor, straight to where and how it is wanted. One of a large file that needs no change is the file
        itself, mapped: the file must not be overwritten in place while it is in use."""
        channels_last = channels_last and self.shape[2:] != (1, 1)  # of which either layout is the other
        dtype, wanted = dtype or self.dtype, self.tensor.permute(0, 2, 3, 1) if channels_last else self.tensor
        if dtype != self.dtype or not wanted.is_contiguous():  # numpy's memory has huge pages: a third of the time
            memory = np.empty(wanted.numel() * torch.empty(0, dtype=dtype).element_size(), np.uint8)
            wanted = torch.from_numpy(memory).view(dtype).view(wanted.shape).copy_(wanted)
            self.release()
        return (wanted.permute(0, 3, 1, 2) if channels_last else wanted).to(device)


class _Reader:
    """Reads a torch zip; `lazy`: with StoredTensor in place of its tensors."""

    def __init__(self, path, lazy):
        self.lazy, self.flats, self.stack, self.marks, self.memo = lazy, {}, [], [], {}
        with open(path, "rb") as f:
            self.records = _records(f)
            self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # private: writing leaves the file alone
        self.large = len(self.map) >= LARGE
        roots = [n[: -len("data.pkl")] for n in self.records if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("no data.pkl in the zip")
        self.root = roots[0]
        if self.root + "byteorder" in self.records and bytes(self.bytes("byteorder")) != b"little":
            raise ValueError("its numbers are big-endian")

    def bytes(self, name):
        """A record, not copied."""
        begin, info = self.records[self.root + name]
        if info.compress_type or info.compress_size != info.file_size or info.flag_bits & 1:
            raise Refusal(f"its {name} is compressed: torch.save it anew")
        data = memoryview(self.map)[begin : begin + info.file_size]
        if not (self.large and name.startswith("data/")) and zlib.crc32(data) != info.CRC:
            raise ValueError(f"damaged at {name}")
        return data

    def content(self):
        """Runs the pickle; pickletools tells what each instruction means."""
        data = self.bytes("data.pkl")
        if len(data) > PICKLE_BYTES:
            raise Refusal(f"its pickle has more than {PICKLE_BYTES} bytes")
        file = io.BytesIO(data)
        for _ in range(PICKLE_STEPS):
            op = pickletools.code2op[file.read(1).decode("latin-1")]
            if op.name not in _KNOWN:
                raise Refusal(f"its pickle has the instruction {op.name}")
            argument = op.arg.reader(file) if op.arg else None
            taken = self.take(_TAKES[op.name]) if op.name in _TAKES else []
            if op.name == "STOP":
                return _bounded(taken[0])
            self.step(op.name, argument, taken)
        raise Refusal(f"its pickle has more than {PICKLE_STEPS} instructions")

    def take(self, n):
        if n is None:
            taken, self.stack = self.stack, self.marks.pop()
            return taken
        if n > len(self.stack):
            raise ValueError("its pickle is damaged")
        return [self.stack.pop() for _ in range(n)][::-1]

    def step(self, name, argument, taken):
        if name in _LITERALS:
            self.stack.append(argument)
        elif name in _MAKES:
            self.stack.append(_MAKES[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(taken))
        elif name in _FILLS:
            _fill(self.stack[-1], taken)
        elif name in _CALLS:
            self.stack.append(self.call(*taken[:2]))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.stack.append(_named(".".join(taken or argument.split(" ", 1))))
        elif name == "BINPERSID":
            self.stack.append(self.storage(*taken[0]))
        elif name == "BUILD" and isinstance(self.stack[-1], Inert):
            self.stack[-1].state = taken[0]
        elif name == "MARK":
            self.marks.append(self.stack)
            self.stack = []
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in _MEMO:
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]

    def call(self, function, arguments):
        """What a class or function of the file gives."""
        if function.name.startswith("torch._utils._rebuild_tensor"):  # or _rebuild_tensor_v2
            return self.tensor(*arguments[:4])
        if function.name == "torch._tensor._rebuild_from_type_v2":
            return self.call(arguments[0], arguments[2])
        if function.name in ("torch._utils._rebuild_parameter", "torch.Size"):
            return arguments[0]
        return {} if function.name == "collections.OrderedDict" and not arguments else Inert(function.name)

    def storage(self, kind, storage_class, key, device, numel, *_):
        """(key, a record as a tensor [numel]); its size is checked."""
        if type(key) is not str:  # to hash anything else may crash, or take forever
            raise Refusal("it has a storage whose name is no text")
        dtype = _DTYPES[storage_class.name]
        if (key, dtype) not in self.flats:
            data = self.bytes(f"data/{key}")
            if not self.large or self.records[f"{self.root}data/{key}"][0] % 8:
                data = bytearray(data)
            self.flats[key, dtype] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(self.flats[key, dtype]) != numel:
            raise Refusal(f"its data/{key} is not of the size that the tensors in it want")
        return key, self.flats[key, dtype]

    def tensor(self, storage, offset, shape, stride):
        key, flat = storage
        if not all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape, *stride)) or len(shape) > 32:
            raise Refusal("it has a tensor of impossible shape")
        count = math.prod(shape)
        reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if count else 0
        if offset + reach > len(flat) or len(shape) != len(stride):
            raise Refusal(f"it has a tensor beyond the end of its data/{key}")
        if count > reach:
            raise Refusal("it has a tensor that repeats its numbers: save it contiguous, not expanded")
        tensor = flat.as_strided(shape, stride, offset)
        return StoredTensor(tensor, lambda: self.release(key)) if self.lazy else tensor

    def release(self, key):
        """Takes a mapped record's pages out of memory; they would be read again."""
        if self.large and hasattr(self.map, "madvise"):
            begin, info = self.records[f"{self.root}data/{key}"]
            first, last = -(-begin // mmap.PAGESIZE), (begin + info.file_size) // mmap.PAGESIZE
            if first < last:
                self.map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def _records(file):
    """{name: (begin of its bytes, ZipInfo)} of a zip without gap or overlap, in which no reader could find others."""
    with zipfile.ZipFile(file) as archive:
        infos, directory = sorted(archive.infolist(), key=lambda i: i.header_offset), archive.start_dir
    file.seek(-22, io.SEEK_END)
    if file.read(4) != b"PK\5\6" or len({i.filename for i in infos}) != len(infos):
        raise Refusal("its zip has two ends, or two records of one name")
    records, end, gap = {}, 0, 0
    for info in infos:
        file.seek(info.header_offset)
        header = file.read(30)
        sizes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        name = file.read(sizes[0]).decode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if not 0 <= info.header_offset - end <= gap or name != info.orig_filename or header[:4] != b"PK\3\4":
            raise Refusal("its zip has hidden or overlapping parts")
        begin = info.header_offset + 30 + sum(sizes)
        records[info.filename], end, gap = (begin, info), begin + info.compress_size, 24  # a data descriptor
    if not 0 <= directory - end <= gap:
        raise Refusal("its zip has hidden or overlapping parts")
    return records


def _named(name):
    """A torch.dtype, or a stand-in that is no more than the name."""
    dtype = vars(torch).get(name[len("torch.") :]) if name.startswith("torch.") else None  # getattr may import
    if len(name) > 200 or not isinstance(dtype, torch.dtype) and not _NAMES.fullmatch(name):
        raise Refusal(f"it would run code ({name[:80]})")
    return dtype if isinstance(dtype, torch.dtype) else Inert(name)


def _fill(container, values):
    """Appends to a list, or updates a dict or set with simple keys: others can be made to crash or to take forever."""
    keys = values[::2] if isinstance(container, dict) else values
    if isinstance(container, list):
        container.extend(values)
    elif not isinstance(container, Inert):
        if not all(k is None or isinstance(k, (str, Inert)) or type(k) in (bool, int) and abs(k) < 2**31 for k in keys):
            raise Refusal("it has a key that is neither a text nor a number")
        container.update(zip(keys, values[1::2]) if isinstance(container, dict) else keys)


def _bounded(content):
    """The content, if it ends when it is written out: its parts may hold one another many times over."""
    level = [content]
    for _ in range(DEPTH):
        inner = (c.values() if isinstance(c, dict) else c for c in level if isinstance(c, (dict, list, tuple, set)))
        level = list(itertools.islice(itertools.chain.from_iterable(inner), ITEMS))
        if not level:
            return content
        if len(level) == ITEMS:
            break
    raise Refusal(f"it is nested more than {DEPTH} deep, or holds more than {ITEMS} things")


def read_checkpoint(path, lazy=True):
    """The content of a torch or safetensors file, with StoredTensor in place of its tensors unless `lazy` is False; of
    a TorchScript archive the Inert module. ModelError for a file that is missing, foreign, damaged, or not honest."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file; correct the path, or fetch it first")
    try:
        with open(path, "rb") as f:
            head = f.read(16)
        if head.startswith(b"PK"):
            return _Reader(path, lazy).content()
        if head[8:9] == b"{":
            return _read_safetensors(path, lazy)
        if b"l\xfc\x9cF\xf9 j\xa8P" in head:
            raise ValueError("written by torch before 1.6: load and torch.save it there with a newer one")
        raise ValueError("neither a torch file nor safetensors")
    except Refusal as e:
        raise ModelError(f"{path}: refused, {e}; get it from a source you trust") from None
    except Exception as e:  # damage may fail in any way at all
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        raise ModelError(f"{path}: not a checkpoint, or a damaged one ({reason}); fetch or make it again") from None


def _read_safetensors(path, lazy):
    tensors = load_file(str(path))  # mapped
    if path.stat().st_size < LARGE:
        tensors = {k: v.clone() for k, v in tensors.items()}
    return {k: StoredTensor(v) for k, v in tensors.items()} if lazy else tensors


def read_state_dict(path, content=None):
    """{name: StoredTensor} of a checkpoint, or of its content: of its entry "state_dict" where it has one."""
    content = read_checkpoint(path) if content is None else content
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {k: v for k, v in state.items() if isinstance(v, StoredTensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ModelError(f"{path}: holds no weights; a checkpoint such as sd-v1-4.ckpt is needed")
    return tensors


def load_weights(model, stored, path, device="cpu", dtype=torch.float32):
    """Puts read_state_dict(path) into a LatentDiffusion on `device`, one tensor at a time. U-Net and autoencoder become
    `dtype`, in channels_last. What the model has not is left out. ModelError where a weight is lacking, misshapen or
    not finite."""
    own, places = model.state_dict(keep_vars=True), set()
    text = "cond_stage_model.transformer."
    stored = {re.sub(rf"^{text}(?!text_model\.)", f"{text}text_model.", str(k)): v for k, v in stored.items()}
    if "known_words" in stored:
        words = {k: stored.pop(k).load() for k in [*stored] if k in ("known_words", TABLE)}
        try:
            model.unpack_words(words)
        except (IndexError, RuntimeError):
            raise ModelError(f"{path}: {TABLE} and known_words do not fit the model in this config") from None
        stored.update({k: StoredTensor(v) for k, v in words.items()})
    may_lack = {*getattr(model, "schedule_names", ()), *(k for k in own if k.endswith("position_ids"))}
    for name, target in own.items():
        if name not in stored and name not in may_lack:
            raise ModelError(f"{path}: lacks {name}; it is not a checkpoint of the model in this config")
        if name in stored and stored[name].shape != tuple(target.shape):
            raise ModelError(f"{path}: {name} is {list(stored[name].shape)} where the config says {list(target.shape)}")
    for name in tqdm([n for n in own if n in stored], desc=f"loading {pathlib.Path(path).name}", leave=False, delay=2):
        wanted = dtype if name.startswith(("model.", "first_stage_model.")) else own[name].dtype
        tensor = stored[name].load(device, wanted, channels_last=own[name].dim() == 4)
        if not is_finite(tensor):
            raise ModelError(f"{path}: {name} has NaN or infinity in it; fetch or train it again")
        own[name].data = tensor.clone() if tensor.data_ptr() in places else tensor  # not one memory for two weights
        places.add(tensor.data_ptr())
    return model


def is_finite(tensor):
    """Whether it has neither NaN nor infinity: a finite sum tells quickly, an infinite one may be of large numbers."""
    if tensor.dim() == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # as it lies in memory, twenty times as fast
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite() or tensor.isfinite().all())


@contextlib.contextmanager
def atomic(path):
    """Gives a temporary path beside `path`, renamed to it on success and removed on failure: no half-written file
    stays. ModelError names `path` where it cannot be written."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        raise ModelError(f"{path}: cannot be written ({e.strerror or e}); free some space, or choose another") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
