"""CUDA devices without a GPU: tensors that say they are there, computed by the CPU, and what we call of torch.cuda.

What a device is strict about, this one is, too: tensors of different devices don't mix, a capture refuses whatever
waits for the device, and the replay of a captured graph reads the addresses and the numbers of its capture, nothing
else. What it can't tell is what the kernels of a GPU compute, and how long they take.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parablock.engine import attention, graphs

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
aten = torch.ops.aten
# these hand numbers of the device to the host
ASKING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default, aten.equal.default}


class OnDevice(Tensor):
    """A tensor of a device; `inner` has its numbers."""

    inner: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> "OnDevice":
        with torch.inference_mode(False):  # else a view of a weight could not be tied to it
            made: OnDevice = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device="meta",
            )  # fmt: skip
        made.inner, made.place = inner, place
        return made

    @property
    def device(self) -> torch.device:
        return self.place

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnDevice({self.inner}, {self.place})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the device while the stand-in is off")


class StandIn(TorchDispatchMode):
    """Turned on (`with`), operators run on the devices. `waits`: what made the host wait, as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.graphs: list[Graph] = []
        self.tape: list[tuple[Any, Any, Any, Any]] | None = None  # of the graph being captured
        self.latest = FIRST  # where an operator ran last
        self.free, self.allocated = {FIRST: 2**30, SECOND: 2**30}, 12345

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "parablock":  # an operator in Python, not a kernel
            with self:
                return attention._attend(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of other operators
                return func.decompose(*args, **kwargs)
        tensors = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
        places = {x.place for x in tensors if isinstance(x, OnDevice)}
        wanted = None
        if kwargs.get("device") is not None:
            # "meta": where torch's C++ sees ours
            wanted = {"cpu": None, "meta": self.latest}.get(torch.device(kwargs["device"]).type, kwargs["device"])
            kwargs["device"] = torch.device("cpu")
        if func is aten._to_copy.default:
            source = next(iter(places), None)
            place = wanted if "device" in kwargs else source
            self._copy(source, place, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            source, place = _place(args[1]), _place(args[0])
            self._copy(source, place, (args[2:3] or [kwargs.get("non_blocking")])[0])
        elif places:
            place, *others = places
            assert not others, f"{func}: tensors of {places}"
            mixed = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
            assert not mixed, f"{func}: a tensor of the host among those of the device"
            if func in ASKING:
                self._wait(str(func))
        else:
            place = wanted
        inner_args, inner_kwargs = _map(_inner, args), {name: _map(_inner, x) for name, x in kwargs.items()}
        out = func(*inner_args, **inner_kwargs)
        self.latest = place or self.latest
        if self.tape is not None and place is not None:
            self.tape.append((func, inner_args, inner_kwargs, out))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if alias is not None and alias.is_write:
            return args[0]
        return _map(lambda x: OnDevice(x, place) if place is not None and isinstance(x, Tensor) else x, out)

    def _copy(self, source: torch.device | None, target: torch.device | None, non_blocking: bool | None) -> None:
        if source is None and target is not None and (self.tape is not None or not non_blocking):
            self._wait("from the host")
        elif source is not None and target is None:
            self._wait("to the host")

    def _wait(self, what: str) -> None:
        if self.tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        self.waits.append(what)


def _map(function: Callable[[Any], Any], x: Any) -> Any:
    """Of lists and tuples, which is all that operators take and return."""
    return type(x)([_map(function, y) for y in x]) if type(x) in (list, tuple) else function(x)


def _flat(x: Iterable[Any]) -> list[Any]:
    return [z for y in x for z in (_flat(y) if type(y) in (list, tuple) else [y])]


def _place(x: Tensor) -> torch.device | None:
    return x.place if isinstance(x, OnDevice) else None


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnDevice) else x


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, was in self.tape:
            if func.is_view:
                continue
            now = func(*args, **kwargs)
            for old, new in zip(_flat([was]), _flat([now]), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device


@contextmanager
def turned_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The devices, and torch.cuda as of a process that has them."""
    devices = StandIn()
    current = [SECOND]  # of this thread: not where the model is

    @contextmanager
    def capture(graph: Graph, pool: Any, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert stream.device == current[-1]
        assert devices.tape is None, "a process captures one graph at a time"
        assert graphs._capturing.locked()
        assert capture_error_mode == "thread_local"  # the engines of other threads go on
        devices.tape = graph.tape
        try:
            yield
        finally:
            devices.tape = None
        devices.graphs.append(graph)

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        current.append(which)
        yield
        current.pop()

    replaced: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "Stream": Stream,
        "device": device,
        "synchronize": lambda which: devices._wait("synchronize"),
        "mem_get_info": lambda which: (devices.free[which], 2**31),
        "get_rng_state": lambda which=None: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda *state: None,
        "reset_peak_memory_stats": lambda which: None,
        "max_memory_allocated": lambda which: devices.allocated,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # or torch.tensor(..., device="cuda") would pass the stand-in by
    try:
        with devices:
            yield devices
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def moved(model: nn.Module, place: torch.device = FIRST) -> Any:
    """A copy of the model on a device."""
    model = copy.deepcopy(model)
    seen: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p not in seen:
                seen[p] = nn.Parameter(OnDevice(p.detach(), place), requires_grad=p.requires_grad)
            module.register_parameter(name, seen[p])
        for name, b in module.named_buffers(recurse=False):
            module._buffers[name] = OnDevice(b, place)
    return model


def spread(model: nn.Module) -> Any:
    """A copy with the first half of its layers on the first device and the rest on the second, as by `device_map`."""
    model = moved(model)
    layers = model.model.layers
    for module in (*layers[len(layers) // 2 :], model.model.norm, model.lm_head):
        for name, p in [*module.named_parameters()]:
            owner, _, last = name.rpartition(".")
            module.get_submodule(owner).register_parameter(last, nn.Parameter(OnDevice(p.detach().inner, SECOND)))
        module.register_forward_pre_hook(_bring, with_kwargs=True)
    return model


def _bring(module: nn.Module, args: Any, kwargs: Any) -> Any:
    place = next(module.parameters()).device

    def there(x: Any) -> Any:
        return x.to(place) if isinstance(x, Tensor) else x

    return _map(there, args), {name: _map(there, x) for name, x in kwargs.items()}
