"""The library of csrc/cuda: built, loaded once, and bound by ctypes.

It knows neither Python nor torch, so one build serves all of them. It is built by the install
where there is nvcc, else by its first use on a machine with an NVIDIA GPU (`g2r_fast.native`).
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from . import native
from .build_cache import build_in_cache
from .building import CUDA_OPS
from .native import NativeStatus

__all__ = [
    "DTYPES",
    "HEAD_DIMS",
    "PRODUCTS",
    "Kernel",
    "Library",
    "TileSizes",
    "library",
    "load",
    "status",
    "use",
]

_INTERFACE = 2  # as in csrc/cuda/attention.h
_NO_SUCH_KERNEL = 10010
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
HEAD_DIMS = (64, 128)
PRODUCTS = {"mma": 0, "wgmma": 1}  # of warps, on every GPU; of Hopper's warpgroups
_ALL = 2**31 - 1  # a window that no position leaves

_POINTER, _INT32, _INT64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("q", "k", "v", "out", "lse")),
        *((name, _POINTER) for name in ("segments", "positions", "tiles")),
        *((name, _INT64) for name in ("queries", "keys")),
        ("tile_count", _INT32),
        *((name, _INT32) for name in ("heads", "kv_heads", "head_dim", "dtype", "products")),
        ("window", _INT32),
        ("softcap", ctypes.c_float),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("q", "k", "v", "out", "lse", "grad_out")),
        *((name, _POINTER) for name in ("dq", "dk", "dv", "delta", "segments", "positions")),
        *((name, _POINTER) for name in ("entries", "query_tiles", "key_runs", "key_tiles")),
        *((name, _INT64) for name in ("queries", "keys", "rows", "key_rows")),
        *((name, _INT32) for name in ("query_tile_count", "key_tile_count")),
        *((name, _INT32) for name in ("heads", "kv_heads", "head_dim", "dtype", "products")),
        ("window", _INT32),
        ("softcap", ctypes.c_float),
    ]


class _TileSizes(ctypes.Structure):
    _fields_ = [(name, _INT32) for name in ("forward_rows", "backward_rows", "backward_keys")]


class _Kernel(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        *((name, _INT32) for name in ("threads", "shared_bytes", "architecture")),
    ]


@dataclass(frozen=True)
class TileSizes:
    """What the tables are made for."""

    forward_rows: int  # packed rows of a forward tile
    backward_rows: int  # packed rows of a query tile of the backward
    backward_keys: int  # keys of a key tile of the backward


@dataclass(frozen=True)
class Kernel:
    """What a launch takes of a multiprocessor."""

    name: str
    threads: int
    shared_bytes: int  # dynamic
    architecture: int  # the only one that has code of it; 0: all from sm_80 on


class Library:
    """The entry points of one build.

    Raises OSError where it is none, and RuntimeError where its interface is another one.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        try:
            found = self._library.g2r_interface()
            self._forward = self._entry("g2r_attention_forward")
            self._backward = self._entry("g2r_attention_backward")
            _ = self._library.g2r_probe, self._library.g2r_tile_sizes, self._library.g2r_kernel
            self._error = self._library.g2r_error
            self._error.restype = ctypes.c_char_p
            self._library.g2r_device.restype = ctypes.c_char_p
            self.device_type = self._library.g2r_device().decode()  # "cpu": emulated
        except AttributeError as error:
            raise RuntimeError(f"a function is missing: {error}") from error
        if found != _INTERFACE:
            raise RuntimeError(f"its interface is {found} where this version needs {_INTERFACE}")

    def probe(self, device: torch.device) -> str | None:
        """Why the kernels do not load on a device, as with a driver older than nvcc, or None."""
        with torch.cuda.device(device):
            error = self._library.g2r_probe()
        return f"{self._error(error).decode()} (error {error})" if error else None

    def tile_sizes(self, head_dim: int, products: str) -> TileSizes:
        sizes = _TileSizes()
        error = self._library.g2r_tile_sizes(head_dim, PRODUCTS[products], ctypes.byref(sizes))
        self._check(error, "tile_sizes")
        return TileSizes(sizes.forward_rows, sizes.backward_rows, sizes.backward_keys)

    def kernels(self) -> list[Kernel]:
        found: list[Kernel] = []
        kernel = _Kernel()
        while True:
            error = self._library.g2r_kernel(len(found), ctypes.byref(kernel))
            if error == _NO_SUCH_KERNEL:
                return found
            self._check(error, "kernel")
            sizes = kernel.threads, kernel.shared_bytes, kernel.architecture
            found.append(Kernel(kernel.name.decode(), *sizes))

    def attention_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: torch.Tensor,
        positions: torch.Tensor,
        tiles: torch.Tensor,
        window: int | None,
        softcap: float,
        products: str,
    ) -> None:
        """See `cuda_attention.attention_forward`; the tables are those of `forward_tiles`."""
        queries, heads, head_dim = q.shape
        keys, kv_heads, _ = k.shape
        self._check_tensors(
            "attention_forward",
            (q, (queries, heads, head_dim), q.dtype),
            (k, (keys, kv_heads, head_dim), q.dtype),
            (v, (keys, kv_heads, head_dim), q.dtype),
            (out, (queries, heads, head_dim), q.dtype),
            (lse, (queries, heads), torch.float32),
            (segments, (len(segments), 4), torch.int32),
            (positions, (queries,), torch.int32),
            (tiles, (len(tiles), 4), torch.int32),
        )
        tensors = (q, k, v, out, lse, segments, positions, tiles)
        arguments = _Forward(
            *(tensor.data_ptr() for tensor in tensors),
            queries,
            keys,
            len(tiles),
            heads,
            kv_heads,
            head_dim,
            DTYPES[q.dtype],
            PRODUCTS[products],
            _ALL if window is None else min(window, _ALL),
            softcap,
        )
        self._call(self._forward, arguments, q.device, "attention_forward")

    def attention_backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        segments: torch.Tensor,
        positions: torch.Tensor,
        entries: torch.Tensor,
        query_tiles: torch.Tensor,
        key_runs: torch.Tensor,
        key_tiles: torch.Tensor,
        window: int | None,
        softcap: float,
        products: str,
    ) -> None:
        """See `cuda_attention.attention_backward`; the tables are those of `backward_tiles`."""
        queries, heads, head_dim = q.shape
        keys, kv_heads, _ = k.shape
        rows, key_rows = len(grad_out), len(dk)
        self._check_tensors(
            "attention_backward",
            (q, (queries, heads, head_dim), q.dtype),
            (k, (keys, kv_heads, head_dim), q.dtype),
            (v, (keys, kv_heads, head_dim), q.dtype),
            (out, (queries, heads, head_dim), q.dtype),
            (lse, (queries, heads), torch.float32),
            (grad_out, (rows, heads, head_dim), q.dtype),
            (dq, (rows, heads, head_dim), q.dtype),
            (dk, (key_rows, kv_heads, head_dim), torch.float32),
            (dv, (key_rows, kv_heads, head_dim), torch.float32),
            (segments, (len(segments), 4), torch.int32),
            (positions, (queries,), torch.int32),
            (entries, (len(entries), 6), torch.int32),
            (query_tiles, (len(query_tiles), 2), torch.int32),
            (key_runs, (len(key_runs), 7), torch.int32),
            (key_tiles, (len(key_tiles), 2), torch.int32),
        )
        delta = torch.empty(rows, heads, dtype=torch.float32, device=q.device)
        before = (q, k, v, out, lse, grad_out, dq, dk, dv, delta)
        tables = (segments, positions, entries, query_tiles, key_runs, key_tiles)
        arguments = _Backward(
            *(tensor.data_ptr() for tensor in (*before, *tables)),
            queries,
            keys,
            rows,
            key_rows,
            len(query_tiles),
            len(key_tiles),
            heads,
            kv_heads,
            head_dim,
            DTYPES[q.dtype],
            PRODUCTS[products],
            _ALL if window is None else min(window, _ALL),
            softcap,
        )
        self._call(self._backward, arguments, q.device, "attention_backward")

    def _entry(self, name: str) -> ctypes._NamedFuncPointer:
        entry = getattr(self._library, name)
        entry.argtypes = [_POINTER, _POINTER]
        return entry

    def _call(
        self,
        entry: ctypes._NamedFuncPointer,
        arguments: ctypes.Structure,
        device: torch.device,
        name: str,
    ) -> None:
        # torch's allocator knows of the stream: memory that is freed behind this call is given
        # only to what runs behind it.
        if device.type == "cuda":
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                error = entry(ctypes.byref(arguments), stream)
        else:
            error = entry(ctypes.byref(arguments), None)
        self._check(error, name)

    def _check(self, error: int, name: str) -> None:
        if error:
            raise RuntimeError(f"g2r_fast {name}: {self._error(error).decode()} (error {error})")

    def _check_tensors(
        self, name: str, *tensors: tuple[torch.Tensor, tuple[int, ...], torch.dtype]
    ) -> None:
        device = tensors[0][0].device
        if device.type != self.device_type:
            raise RuntimeError(
                f"g2r_fast {name}: the tensors are on {device}; expected {self.device_type}"
            )
        if tensors[0][2] not in DTYPES:
            raise RuntimeError(f"g2r_fast {name}: q is {tensors[0][2]}, not bfloat16 or float16")
        for index, (tensor, shape, dtype) in enumerate(tensors):
            if (
                tensor.shape != shape
                or tensor.dtype != dtype
                or tensor.device != device
                or not tensor.is_contiguous()
            ):
                raise RuntimeError(
                    f"g2r_fast {name}: argument {index} is {tuple(tensor.shape)} {tensor.dtype} on "
                    f"{tensor.device} with strides {tensor.stride()}; expected contiguous {shape} "
                    f"{dtype} on {device}"
                )


_first_use = threading.Lock()
_library: Library | None = None
_status: NativeStatus | None = None


def load(build: bool = True) -> str | None:
    """Make the kernels available, once; the reason why they are not, None when they are.

    The first call on a machine with an NVIDIA GPU compiles the library where it is missing, unless
    `build` is False, see `g2r_fast.native`.

    Raises InputError where `G2R_BUILD` has no value it knows.
    """
    global _library, _status
    if _library is None and _status is None:
        with _first_use:
            if _library is None and _status is None:
                found, told = _load(build)
                if found is not None or (build and not native.is_looking_only()):
                    _library, _status = found, told
                return told.reason
    return None if _library is not None or _status is None else _status.reason


def library() -> Library:
    """The library that `load` or `use` made available; RuntimeError says why there is none."""
    reason = load()
    if _library is None:
        raise RuntimeError(f"g2r_fast has no CUDA kernels here: {reason}")
    return _library


def use(other: Library | None) -> Library | None:
    """Take this library from now on, for tests; returns the one before."""
    global _library
    before, _library = _library, other
    return before


def status() -> NativeStatus:
    """Whether the library can be used, and the reason where it cannot; builds nothing."""
    return _status or _load(build=False)[1]


def _load(build: bool) -> tuple[Library | None, NativeStatus]:
    found, told = native.load_part(CUDA_OPS, Library, build=False)
    if found is not None or not build or native.is_looking_only():
        return found, told
    if not torch.cuda.is_available():
        return None, _because(told, "it is compiled where there is an NVIDIA GPU")
    if not native.may_build():
        return None, _because(told, "G2R_BUILD=never")
    failed = build_in_cache([CUDA_OPS], native.PACKAGE)
    if CUDA_OPS in failed:
        return None, _because(told, f"it cannot be compiled here ({failed[CUDA_OPS]})")
    return native.load_part(CUDA_OPS, Library, build=False)


def _because(told: NativeStatus, reason: str) -> NativeStatus:
    return NativeStatus(told.part, None, f"{told.reason}; {reason}", told.cost)
