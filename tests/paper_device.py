"""A device on paper: one that is not the CPU, on a machine that has no other. What runs on it would find its tensors on a GPU.

Its tensors hold the CPU's numbers, and autograd works. A CPU tensor that meets one of them raises, as on a GPU; every copy between host and
device, every wait for the device, and every use of a stream is recorded with the line of the package that caused it. It is registered
as torch's private backend, by torch's own means for backends written in Python, and is there once this file is imported.
"""

import collections
import contextlib
import dataclasses
import time
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "paper"
PACKAGE = "/dist_vsd/"


@dataclasses.dataclass
class Record:
    """What the device was asked since the record began.

    Attributes:
        copies: to the device ("in") and from it ("out"), by the line that caused them.
        waits: of the CPU for the device, by line.
        order: of what was queued: ("copy" or "computation", what).
        num_operations: on the device.
    """

    copies: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    waits: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    order: list = dataclasses.field(default_factory=list)
    num_operations: int = 0


record = Record()


@contextlib.contextmanager
def recording():
    """Begin a record anew and yield it."""
    global record
    before, record = record, Record()
    try:
        yield record
    finally:
        record = before


def line():
    """Return the innermost line of the package on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if PACKAGE in frame.filename:
            return f"{frame.filename.rsplit(PACKAGE, 1)[1]}:{frame.lineno}"
    return "elsewhere"


class Stream:
    """A queue of the device; copies and computation that are queued on it are recorded in order."""

    def __init__(self, device=None, name="side"):
        self.name = name

    def wait_stream(self, other):
        record.order.append((self.name, f"waits for {other.name}"))

    def wait_event(self, event):
        record.order.append((self.name, f"waits for {event}"))

    def record_event(self):
        record.order.append((self.name, "mark"))
        return f"mark of {self.name}"

    def synchronize(self):
        record.waits[line()] += 1


class Event:
    """A mark in a queue of the device."""

    def __init__(self, device=None, enable_timing=False):
        self.time = None

    def record(self, stream=None):
        record.order.append((stream.name, "time"))
        self.time = time.perf_counter()

    def synchronize(self):
        """Wait for it. Who has waited for the device since it was recorded, as by reading a figure, waits no more."""

    def elapsed_time(self, other):
        return 1000 * (other.time - self.time)


class Module:
    """torch.paper: what torch and device.py ask of a backend's module."""

    _current = Stream(name="computation")

    @staticmethod
    def is_available():
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    Stream, Event = Stream, Event

    def current_stream(self, device=None):
        return self._current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def synchronize(self, device=None):
        record.waits[line()] += 1

    def max_memory_allocated(self, device=None):
        return 0


torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
DEVICE = torch.device(NAME, 0)


class PaperTensor(torch.Tensor):
    """A tensor of the device; ``raw`` is the CPU's that holds its numbers."""

    @staticmethod
    def __new__(cls, raw):
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.size(), device=DEVICE, requires_grad=False, **layout)
        made.raw = raw
        return made

    def __repr__(self):
        return f"PaperTensor({self.raw})"

    def tolist(self):
        record.waits[line()] += 1
        return self.raw.tolist()

    def numpy(self, *_arguments, **_options):
        raise TypeError("can't convert a tensor of a device to numpy: copy it to the host first")

    def record_stream(self, stream):
        record.order.append((stream.name, "keeps a tensor"))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class OnPaper(TorchDispatchMode):
    """Inside it tensors that are made on the device are its own, and modules move by swapping their parameters: torch's own way for
    tensors of another class."""

    def __enter__(self):
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_swap_module_params_on_conversion(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


def raw_of(value):
    if isinstance(value, PaperTensor):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def is_copy(name):
    return name.startswith(("aten._to_copy", "aten.copy_"))


def is_wait(name, args):
    """Say whether an operation on the device makes the CPU wait for its result, as its shape depends on it or it is read."""
    if name.startswith(("aten.index.Tensor", "aten.index_put")):
        return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
    return name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique", "aten.equal"))


def dispatch(function, args, kwargs):
    """Do an operation of torch on the numbers, and record what it would mean on a device."""
    name, flat = str(function), tree_flatten((args, kwargs))[0]
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    is_here = any(isinstance(tensor, PaperTensor) for tensor in tensors)
    wanted = kwargs.get("device")
    goes_here = torch.device(wanted).type == NAME if wanted is not None else is_here
    if is_copy(name):
        source = args[1] if name.startswith("aten.copy_") else args[0]
        is_queued = kwargs.get("non_blocking") or (name.startswith("aten.copy_") and args[2:] == (True,))
        copy(source, isinstance(args[0], PaperTensor) if name.startswith("aten.copy_") else goes_here, bool(is_queued))
    elif is_here:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, PaperTensor) and tensor.dim() > 0]
        if strangers:
            raise RuntimeError(f"{name}: a CPU tensor {tuple(strangers[0].shape)} meets one on {DEVICE}, at {line()}")
        if is_wait(name, args):
            record.waits[line()] += 1
        record.num_operations += 1
    if kwargs.get("pin_memory"):
        record.order.append((torch.get_device_module(DEVICE).current_stream().name, "pinned memory"))
        kwargs = kwargs | {"pin_memory": False}
    result = function(*tree_map(raw_of, args), **tree_map(raw_of, kwargs))
    changes_in_place = function._schema.name.endswith("_") and not function._schema.name.startswith("aten::__")
    if changes_in_place and isinstance(result, torch.Tensor):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda value: PaperTensor(value) if isinstance(value, torch.Tensor) else value, result) if goes_here else result


def copy(source, goes_here, is_queued):
    """Record a copy between host and device; to the host one waits for it, unless it is queued."""
    if isinstance(source, PaperTensor) != goes_here:
        record.waits[line()] += not goes_here and not is_queued
        record.copies["in" if goes_here else "out", line()] += 1
        record.order.append((torch.get_device_module(DEVICE).current_stream().name, "copy in" if goes_here else "copy out"))


# Outside of OnPaper torch asks the backend itself for memory and copies.
_library = torch.library.Library("aten", "IMPL")


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return PaperTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return PaperTensor(torch.empty(size, dtype=dtype))


def _copy_from(source, destination, non_blocking=False):
    copy(source, isinstance(destination, PaperTensor), non_blocking)
    raw_of(destination).copy_(raw_of(source))
    return destination


def _copy_into(destination, source, non_blocking=False):
    return _copy_from(source, destination, non_blocking)


_OF_THE_BACKEND = {"empty_strided": _empty_strided, "empty.memory_format": _empty, "_copy_from": _copy_from, "copy_": _copy_into}
for _name, _function in _OF_THE_BACKEND.items():
    _library.impl(_name, _function, "PrivateUse1")
