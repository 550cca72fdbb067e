"""Reading checkpoints safely and in little memory.

A torch checkpoint is a zip of a pickle, which may run any code when it is read, and of raw tensor data. The pickle is
read here with an unpickler that builds only containers, numbers and descriptions of tensors; the tensors follow one by
one, as they are asked for. Objects of trainers (Lightning, OmegaConf ...) become inert stand-ins: their packages are
never imported.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import pathlib
import pickle
import re
import struct
import zipfile

import torch
from torch import nn
from tqdm import tqdm

from ldm.util import ModelError

# precision: (its name in torch's files, its name in safetensors)
_NAMES = {
    torch.float64: ("Double", "F64"),
    torch.float32: ("Float", "F32"),
    torch.float16: ("Half", "F16"),
    torch.bfloat16: ("BFloat16", "BF16"),
    torch.int64: ("Long", "I64"),
    torch.int32: ("Int", "I32"),
    torch.int16: ("Short", "I16"),
    torch.int8: ("Char", "I8"),
    torch.uint8: ("Byte", "U8"),
    torch.bool: ("Bool", "BOOL"),
}
_DTYPES, _SAFETENSORS_DTYPES = ({names[i]: dtype for dtype, names in _NAMES.items()} for i in range(2))


class StoredTensor:
    """A tensor that is still in its file; load() reads it."""

    def __init__(self, read, dtype, shape, stride, offset):
        self.read, self.dtype, self.shape, self.stride, self.offset = read, dtype, tuple(shape), tuple(stride), offset

    def load(self):
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(self.read(), dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).contiguous()


class Inert:
    """Stands for an object whose class is not wanted: takes any argument, keeps the state, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def extend(self, *values):
        pass

    append = __setitem__ = extend


def _rebuild_tensor(storage, offset, shape, stride, *unused):
    return StoredTensor(*storage, shape, stride, offset)


def _rebuild_parameter(tensor, *unused):
    return tensor


def _rebuild_subclass(rebuild, tensor_class, arguments, state):
    return rebuild(*arguments)


_BUILT = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): Inert,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_subclass,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("__builtin__", "set"): set,
    **{("builtins", t.__name__): t for t in (dict, list, tuple, set, int, float, bool, str)},
}
_INERT_PACKAGES = {
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "omegaconf",
    "numpy",
    "argparse",
    "pathlib",
    "typing",
    "transformers",
    "ldm",
    "collections",
    "_codecs",
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, open_storage):
        super().__init__(file)
        self.open_storage = open_storage

    def persistent_load(self, pid):
        _, dtype, key = pid[:3]
        return (lambda: self.open_storage(key)), dtype

    def find_class(self, module, name):
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if module == "torch" and name.endswith("Storage") and name[:-7] in _DTYPES:
            return _DTYPES[name[:-7]]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] in _INERT_PACKAGES or module.startswith("torch.nn."):
            return Inert
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def read_checkpoint(path):
    """The content of a torch (zip) or safetensors file, with StoredTensor in place of its tensors.

    Raises ModelError, in one line, for a file that is missing, foreign, damaged, or would run code.
    """
    path = pathlib.Path(path)
    try:
        with open(path, "rb") as f:
            head = f.read(9)
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        if len(head) == 9 and head[8:] == b"{":
            return _read_safetensors(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; correct the path, or fetch it first") from None
    except OSError as e:
        raise ModelError(f"{path}: cannot be read ({e.strerror or e})") from None
    except pickle.UnpicklingError as e:
        if "it would run" in str(e):
            raise ModelError(f"{path}: refused, {e} when opened; get the checkpoint from a source you trust") from None
        raise ModelError(f"{path}: damaged ({e}); fetch it again") from None
    except Exception as e:  # a damaged pickle may fail in any way at all
        raise ModelError(f"{path}: damaged, or not a checkpoint ({type(e).__name__}: {str(e)[:80]})") from None
    raise ModelError(f"{path}: neither a torch checkpoint (of 1.6 or newer) nor safetensors; a broken download?")


def _read_zip(path):
    archive = zipfile.ZipFile(path)
    names = [n for n in archive.namelist() if n.split("/")[-1] == "data.pkl"]
    if len(names) != 1:
        raise ValueError("no data.pkl in the zip")
    prefix = names[0][: -len("data.pkl")]

    def open_storage(key):
        info = archive.getinfo(f"{prefix}data/{key}")
        data = bytearray(info.file_size)
        with archive.open(info) as f:  # checks the record's CRC
            f.readinto(data)
        return data

    return _Unpickler(io.BytesIO(archive.read(names[0])), open_storage).load()


def _read_safetensors(path):
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        if length > path.stat().st_size:
            raise ValueError("header longer than the file")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)

    def reader(begin, end):
        def read():
            data = bytearray(end - begin)
            with open(path, "rb") as f:
                f.seek(8 + length + begin)
                if f.readinto(data) != len(data):
                    raise ValueError("truncated")
            return data

        return read

    tensors = {}
    for name, entry in header.items():
        shape = entry["shape"]
        stride = [1] * len(shape)
        for i in reversed(range(len(shape) - 1)):
            stride[i] = stride[i + 1] * shape[i + 1]
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        tensors[name] = StoredTensor(reader(*entry["data_offsets"]), dtype, shape, stride, 0)
    return tensors


def load_tensor(stored, name, path):
    """stored.load(), with damage reported as ModelError."""
    try:
        return stored.load()
    except Exception as e:  # CRC and size errors of zip and torch
        raise ModelError(f"{path}: damaged at {name} ({str(e).splitlines()[0][:80]}); fetch it again") from None


def read_state_dict(path):
    """{name: StoredTensor} of a checkpoint: of its entry "state_dict" where it has one."""
    content = read_checkpoint(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {k: v for k, v in state.items() if isinstance(v, StoredTensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ModelError(f"{path}: holds no weights; a checkpoint such as sd-v1-4.ckpt is needed")
    return tensors


def load_weights(model, stored, path, device="cpu", dtype=torch.float32):
    """Puts read_state_dict(path) into a LatentDiffusion, one tensor at a time, and moves it to `device`.
    U-Net and autoencoder become `dtype`, convolutions in channels_last; the rest keeps its precision. What the file has
    beyond the model is left out; where it has embeddings of `known_words` alone (their ids, [n]), other words get their
    mean. ModelError where it lacks a weight, or one has another shape.
    """
    own = model.state_dict(keep_vars=True)
    text = "cond_stage_model.transformer."
    stored = {re.sub(rf"^{text}(?!text_model\.)", f"{text}text_model.", k): v for k, v in stored.items()}
    table, known = f"{text}text_model.embeddings.token_embedding.weight", stored.pop("known_words", None)
    if known is not None and table in stored:
        rows, known = load_tensor(stored.pop(table), table, path), load_tensor(known, "known_words", path).long()
        try:
            own.pop(table).data.copy_(rows.float().mean(0))[known] = rows.float()
        except (IndexError, RuntimeError):
            raise ModelError(f"{path}: {table} and known_words do not fit the model in this config") from None
    may_lack = set(model.schedule_names) | {k for k in own if k.endswith("position_ids")}
    for name, target in own.items():
        if name not in stored and name not in may_lack:
            raise ModelError(f"{path}: lacks {name}; it is not a checkpoint of the model in this config")
        if name in stored and stored[name].shape != tuple(target.shape):
            raise ModelError(f"{path}: {name} is {list(stored[name].shape)} where the config says {list(target.shape)}")
    for name in tqdm([n for n in own if n in stored], desc=f"loading {pathlib.Path(path).name}", leave=False, delay=2):
        tensor, target = load_tensor(stored[name], name, path), own[name]
        wanted = dtype if name.startswith(("model.", "first_stage_model.")) else target.dtype
        layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        target.data = tensor.to(device, wanted).contiguous(memory_format=layout)
    return model


def fingerprint(module):
    """Sixteen hexadecimal digits that name a text encoder's weights, the same in float32 and float16."""
    rows = [m.weight.detach()[:64] for m in module.modules() if isinstance(m, nn.Embedding)]
    return hashlib.sha256(b"".join(r.half().cpu().numpy().tobytes() for r in rows)).hexdigest()[:16]
