"""A pretend accelerator: device "pretend:0" computes on the CPU, but its tensors refuse to meet the CPU's.

    with Pretend() as device:
        main(["--device", "pretend:0", ...])
    assert device.reads == 0

What a GPU refuses it refuses: operations between tensors of two devices (CPU scalars are fine), a CPU generator for a
tensor of the device, .numpy() of one, indexing a CPU tensor by one. As Apple's mps it has no float64, unless asked for.
It counts what makes a program wait until the device has done all that was asked of it: `reads`, the values that Python
wants to see (.item(), a branch on a tensor, a boolean index); `downloads`, copies to the CPU; `uploads`, copies to the
device that do not say non_blocking. `largest` is the number of bytes of the largest tensor that it made.

It does not see speed, what a kernel of a GPU rounds or lacks, autocast, the memory in all, the float64 of Python's own
numbers, nor `parameter.data = tensor` from one device to another, which a torch.Tensor in Python cannot do. What
torch.save writes of its tensors are CPU tensors.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
torch.pretend.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
DEVICE = torch.device("pretend", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
READING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero}
now = None  # the Pretend whose `with` is being executed; backward passes have threads of their own, which ask it


class Pretend(TorchDispatchMode):
    def __init__(self, float64=False):
        super().__init__()
        self.float64 = float64
        self.reset()

    def reset(self):
        self.reads = self.downloads = self.uploads = self.largest = 0

    def __enter__(self):
        global now
        now = self
        self.constants = Constants()
        self.constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.constants.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})


class Constants(TorchFunctionMode):
    """torch.tensor([...], device="pretend"), which C++ would make without asking."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


class OnDevice(torch.Tensor):
    """Wraps a CPU tensor, `inner`, and says that it is on the device."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64 and not now.float64:
            raise TypeError("the device has no float64, as mps")
        now.largest = max(now.largest, inner.numel() * inner.element_size())
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        x = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=DEVICE, **layout)
        x.inner = inner
        return x

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:  # of a list C++ would make an index on the device, which it cannot
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
        return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return call(function, args, kwargs or {})

    def __repr__(self):
        return f"OnDevice({self.inner!r})"

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = OnDevice(self.inner.clone()).requires_grad_(self.requires_grad)
        memo[id(self)] = copied
        return copied

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor of pretend:0 has no numpy(); take .cpu() first")

    __array__ = numpy

    def tolist(self):
        now.reads += 1
        return self.inner.tolist()


def inner(x):
    return x.inner if isinstance(x, OnDevice) else x


def tensors_of(x):
    """The tensors in an operation's arguments or result; torch's own pytree takes longer than the operations."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for y in x for t in tensors_of(y)] if isinstance(x, (list, tuple)) else []


def mapped(function, x):
    return type(x)([mapped(function, y) for y in x]) if isinstance(x, (list, tuple)) else function(x)


def call(function, args, kwargs):
    """One operation of torch: refused, or computed on the CPU, its results on the device if it is one of the device."""
    tensors = tensors_of([args, list(kwargs.values())])
    here = [x for x in tensors if isinstance(x, OnDevice)]
    if function is aten.copy_.default:
        return copy(*args[:2], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    asked, on_device = kwargs.get("device"), bool(here)
    if asked is not None:
        on_device = torch.device(asked).type == "pretend"
        kwargs = {**kwargs, "device": CPU}
    waits = not kwargs.get("non_blocking", False)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("non_blocking", "pin_memory")} if on_device else kwargs
    if function is aten._to_copy.default:
        now.downloads += bool(here) and not on_device
        now.uploads += on_device and not here and waits
    elif here or on_device:
        refuse(function, args, kwargs, here, [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0])
    masked = function is aten.index.Tensor and any(x.dtype == torch.bool for x in tensors[1:])
    now.reads += bool(here) and (masked or function.overloadpacket in READING)
    result = function(*mapped(inner, args), **{k: mapped(inner, v) for k, v in kwargs.items()})
    if not on_device:
        return result
    known = {id(x.inner): x for x in here}  # what works in place returns its own tensor

    def wrapped(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
            return x
        return known[id(x)] if id(x) in known else OnDevice(x)

    return mapped(wrapped, result)


def copy(target, source, non_blocking):
    now.downloads += isinstance(source, OnDevice) and not isinstance(target, OnDevice)
    now.uploads += isinstance(target, OnDevice) and not isinstance(source, OnDevice) and not non_blocking
    inner(target).copy_(inner(source))
    return target


def refuse(function, args, kwargs, here, elsewhere):
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"{function}: a CPU generator cannot fill a tensor of pretend:0")
    if function in INDEXING:
        if not isinstance(args[0], OnDevice):
            raise RuntimeError(f"{function}: a tensor of pretend:0 cannot index one on the CPU")
    elif here and elsewhere:
        raise RuntimeError(f"{function}: of pretend:0 and of the CPU: {[tuple(x.shape) for x in elsewhere]}")
