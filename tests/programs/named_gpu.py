"""A GPU in name only: its tensors say that they are on device ``gpu``, and are computed on the CPU.

Host and device meet as they do on a machine with a GPU: an operation that takes tensors of both fails, and whatever
makes the host wait for the device is noted down in ``waits``. Autocast casts as CUDA's does. There are no kernels, no
streams and no clocks.

Importing this renames torch's device for other makers, once and for all: let a process do nothing else.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
READS_VALUES = {  # the shape of what comes out, or a number for the host, follows from values on the device
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
}
# What CUDA's autocast does to these operations (torch 2.13, aten/src/ATen/autocast_mode.h): others than the CPU's
IN_BF16 = (
    *("linear", "matmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "prelu"),
    *("conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention"),
)
IN_FP32 = (
    *("exp", "expm1", "log", "log10", "log1p", "log2", "logsumexp", "reciprocal", "rsqrt", "softplus", "tan", "dist"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "layer_norm", "native_layer_norm", "group_norm"),
    *("cosine_similarity", "nll_loss", "mse_loss", "l1_loss", "kl_div", "binary_cross_entropy_with_logits"),
)
GIVING_FP32 = (  # unless they are told otherwise
    *("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod", "prod.dim_int", "cumsum", "cumprod"),
    "linalg_vector_norm",
)
IN_THE_WIDEST = ("addcdiv", "addcmul", "atan2", "cat", "dot", "index_put", "scatter_add", "stack")
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # a mask's shape follows from values

waits: list[str] = []
_locked: dict[int, Tensor] = {}  # page-locked memory by its address; held, so that no other gets that address


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("gpu", backend_module=_Module())
GPU = torch.device("gpu", 0)
_CASTS = torch.library.Library("_", "IMPL")
_CASTS.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


class OnGpu(Tensor):
    """A tensor of the device; ``host`` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> OnGpu:
        strides, offset = host.stride(), host.storage_offset()
        made = Tensor._make_wrapper_subclass(
            cls, host.shape, strides=strides, storage_offset=offset, dtype=host.dtype, device=GPU
        )
        made.host = host
        return made

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other: OnGpu) -> None:  # as Module.float() sets it
        Tensor.data.__set__(self, other)
        self.host = other.host

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Machine(TorchDispatchMode):
    """Inside, torch has the device. In other threads tensors can be brought to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __enter__(self) -> Machine:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="gpu") is then seen here as a copy
        return super().__enter__()


@torch.library.impl("aten::empty_strided", "PrivateUse1")
def _empty_strided(size: Any, stride: Any, *, dtype: torch.dtype | None = None, **_: Any) -> OnGpu:
    return OnGpu(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::empty.memory_format", "PrivateUse1")
def _empty(size: Any, *, dtype: torch.dtype | None = None, **_: Any) -> OnGpu:
    return OnGpu(torch.empty(size, dtype=dtype))


@torch.library.impl("aten::_local_scalar_dense", "PrivateUse1")
def _local_scalar_dense(tensor: OnGpu) -> Any:  # of torch.tensor([...]) with tensors in the list
    _note("aten::_local_scalar_dense", "")
    return tensor.host.item()


def _autocast(name: str, dtype_of: Callable[[list[Tensor]], torch.dtype]) -> None:
    """Under autocast, operation ``name`` takes its floating tensors in that dtype."""
    packet, _, overload = name.partition(".")
    call = getattr(getattr(aten, packet), overload or "default")
    takes_dtype = name in GIVING_FP32
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args: Any, **kwargs: Any) -> Any:
        floating = [leaf for leaf in tree_leaves((args, kwargs)) if _is_cast(leaf)]
        dtype = dtype_of(floating)
        with torch._C._ExcludeDispatchKeyGuard(off):
            if takes_dtype:
                is_told = any(isinstance(given, torch.dtype) for given in (*args, *kwargs.values()))
                return call(*args, **kwargs, **({} if is_told or not floating else {"dtype": dtype}))
            return call(*tree_map(lambda leaf: leaf.to(dtype) if _is_cast(leaf) else leaf, args), **kwargs)

    torch.library.impl(f"aten::{name}", "AutocastPrivateUse1")(cast)


def _is_cast(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dtype != torch.float64


def _widest(tensors: list[Tensor]) -> torch.dtype:
    return torch.float32 if any(tensor.dtype == torch.float32 for tensor in tensors) else torch.bfloat16


for _names, _dtype_of in (
    (IN_BF16, lambda _: torch.bfloat16),
    (IN_FP32 + GIVING_FP32, lambda _: torch.float32),
    (IN_THE_WIDEST, _widest),
):
    for _name in _names:
        _autocast(_name, _dtype_of)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Machine():
            return func.decompose(*args, **kwargs)
    if func is aten.is_pinned.default:
        return _is_locked(args[0])
    if func is aten._pin_memory.default:
        return _locked_memory(args[0].clone())
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu, on_host = _parted(given)
    makes_on_gpu = bool(on_gpu)
    if func is aten.copy_.default:
        makes_on_gpu = isinstance(args[0], OnGpu)
        _note_copy(func, args[1], makes_on_gpu, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    elif "device" in kwargs and kwargs["device"] is not None:
        makes_on_gpu = torch.device(kwargs["device"]).type == GPU.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if func is aten._to_copy.default:
            _note_copy(func, args[0], makes_on_gpu, kwargs.get("non_blocking", False))
    elif on_gpu:
        _check(func, on_host, tree_leaves(args[1]) if func in BY_INDEX else [])
    taken = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    made = func(*tree_map(_host, args), **tree_map(_host, taken))
    if kwargs.get("pin_memory"):
        return _locked_memory(made)
    known = {id(_host(tensor)): tensor for tensor in given}  # what comes back of in-place operations
    return tree_map(lambda out: known.get(id(out)) if id(out) in known else _placed(out, makes_on_gpu), made)


def _note_copy(func: Any, source: Tensor, to_gpu: bool, non_blocking: bool) -> None:
    """A copy is only waited for if it comes from the device, or if it is not from page-locked memory in background."""
    from_gpu = isinstance(source, OnGpu)
    if from_gpu and not to_gpu:
        _note(func, "to the host")
    elif to_gpu and not from_gpu and not (non_blocking and _is_locked(source)):
        _note(func, "from the host")


def _check(func: Any, on_host: Iterable[Tensor], indices: Iterable[Any]) -> None:
    """A number may come from the host, and an index, which is then brought; everything else must be on the device."""
    is_mask = [index.dtype in (torch.bool, torch.uint8) for index in indices if isinstance(index, Tensor)]
    from_host = any(tensor.dim() for tensor in on_host)
    if from_host and not is_mask:
        raise RuntimeError(f"{func} takes tensors of two devices: {_where()}")
    if from_host or any(is_mask) or func in READS_VALUES:
        _note(func, "")


def _note(func: Any, what: str) -> None:
    waits.append(f"{func} {what}: {_where()}")


def _where() -> str:
    """The innermost lines of ours or of transformers that led here."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    frames = [frame for frame in frames if frame.filename != __file__]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]} {frame.name}" for frame in reversed(frames[-3:]))


def _parted(tensors: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for tensor in tensors:
        sides[not isinstance(tensor, OnGpu)].append(tensor)
    return sides


def _locked_memory(made: Tensor) -> Tensor:
    _locked[made.untyped_storage().data_ptr()] = made
    return made


def _is_locked(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in _locked


def _host(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, OnGpu) else leaf


def _placed(made: Any, on_gpu: bool) -> Any:
    if not (on_gpu and isinstance(made, Tensor)):
        return made
    with torch.inference_mode(made.is_inference()):  # a view of what was made outside of inference mode is none of it
        return OnGpu(made)
