"""Named tensors in files: safetensors in and out; torch and DeepMind checkpoints in.

Checkpoints of torch and NumPy are pickles, which can run any code when they are read. Here they go
through an unpickler that knows a fixed list of names, each of which only makes arrays, and refuses
every other. Neither torch nor safetensors is needed.
"""

from __future__ import annotations

import io
import json
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

Path = str | os.PathLike[str]

_SAFE_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_SAFE_NAMES = {dtype: name for name, dtype in _SAFE_DTYPES.items()}

_STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_tensors(path: Path) -> Any:
    """What a checkpoint file holds: nested dicts and lists of NumPy arrays and plain values.

    The format is told from the content: safetensors, or what ``torch.save`` writes, now (zip) or
    before torch 1.6. No code in the file runs, and torch is not needed.

    Raises ``ValueError`` where the file is none of these, is truncated, or refers to anything but
    tensors, arrays and plain containers.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        head = file.read(9)
        file.seek(0)
        size = path.stat().st_size
        if head.startswith(b"PK\x03\x04"):
            return _guarded(path, lambda: _read_zip(file))
        if head[8:] == b"{":
            return _guarded(path, lambda: _read_safetensors(file, size)[0])
        if head.startswith(b"\x80"):
            return _guarded(path, lambda: _read_legacy(file, size))
    raise ValueError(
        f"{path} is neither a safetensors file nor one that torch.save wrote: it begins with "
        f"{head[:8]!r}"
    )


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """``read()``, its errors as ``ValueError`` with the name of the file."""
    try:
        return read()
    except _Refused as error:
        raise ValueError(f"{os.fspath(path)} {error}") from error
    except Exception as error:
        # Whatever a damaged file leads to: unpicklers fail in a dozen ways.
        raise ValueError(
            f"{os.fspath(path)} is damaged or truncated: {type(error).__name__}: {error}"
        ) from error


# safetensors


def _read_safetensors(file: BinaryIO, size: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise ValueError(f"its header of {length} bytes does not fit into {size} bytes")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    data = np.fromfile(file, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFE_DTYPES:
            raise ValueError(f"tensor {name} has dtype {entry['dtype']}")
        dtype, shape = _SAFE_DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"tensor {name} of shape {shape} is said to be at bytes {begin} to {end} of "
                f"{len(data)}"
            )
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
    return tensors, metadata


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write named arrays as safetensors; the file appears complete or not at all."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    arrays, offset = [], 0
    for name, value in tensors.items():
        array = np.asarray(value, order="C")
        if array.dtype not in _SAFE_NAMES:
            raise ValueError(f"{name} has dtype {array.dtype}, which safetensors does not know")
        end = offset + array.nbytes
        header[name] = {
            "dtype": _SAFE_NAMES[array.dtype],
            "shape": array.shape,
            "data_offsets": [offset, end],
        }
        arrays.append(array)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in arrays:
                file.write(array.tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# Pickles, read without running what they say.


class _Refused(Exception):
    """A pickle asks for something that no weights need."""


class _Known:
    """A function for a pickle to call. A pickle may also set attributes; here there are none."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Refused(f"sets the attribute {name!r} of a function")

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self._call(*arguments)


class _Dtype:
    """A ``numpy.dtype`` in a pickle."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A ``numpy.ndarray`` in a pickle; ``value`` is the array, or a list for objects."""

    __slots__ = ("value",)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if isinstance(data, list):
            self.value: Any = data
        else:
            flat = np.frombuffer(data, dtype.dtype)
            self.value = flat.reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(
    data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: Any = None
) -> np.ndarray:
    array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    # With axes where the order is "K", neither C nor Fortran.
    return array if axes is None else array.transpose(axes)


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # how old protocols spell bytes
        raise _Refused(f"encodes text as {encoding!r}, which weights have no need of")
    return text.encode("latin1")


def _tensor(storage: np.ndarray, offset: int, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """The view of a storage that a tensor is; ``ValueError`` where it reaches beyond it."""
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"tensor of size {size}, stride {stride} and offset {offset}")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    if math.prod(size) and last >= len(storage):
        raise ValueError(f"tensor of size {size} reaches beyond its {len(storage)} stored elements")
    steps = tuple(s * storage.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _parameter(data: Any, *_: Any) -> Any:
    return data


_NUMPY: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Known(_Dtype),
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument of _reconstruct, never called
    ("_codecs", "encode"): _Known(_encode),
    ("collections", "OrderedDict"): OrderedDict,
}
for _module in ("numpy.core", "numpy._core"):
    _NUMPY[_module + ".multiarray", "_reconstruct"] = _Known(_reconstruct)
    _NUMPY[_module + ".multiarray", "scalar"] = _Known(_scalar)
    _NUMPY[_module + ".numeric", "_frombuffer"] = _Known(_from_buffer)

_TORCH: dict[tuple[str, str], Any] = {
    **_NUMPY,
    **{("torch", name): name for name in _STORAGES},
    ("torch._utils", "_rebuild_tensor"): _Known(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Known(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Known(_parameter),
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """Knows the names in ``known`` and no other."""

    def __init__(
        self,
        file: Any,
        known: Mapping[tuple[str, str], Any],
        storage: Callable[[str, np.dtype, int], np.ndarray] | None = None,
    ) -> None:
        super().__init__(file)
        self._known = known
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """What stands for ``module.name`` here."""
        if (module, name) not in self._known:
            raise _Refused(
                f"refers to {module}.{name}, which may run code, and was not read further; only "
                "tensors and plain containers are read: save module.state_dict(), not the module"
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The storage of a tensor."""
        if self._storage is None:
            raise ValueError("stored data outside of the pickle")
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or dtype not in _STORAGES:
            raise ValueError(f"stored data of kind {kind!r} and type {dtype!r}")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage that is a view of another")
        return self._storage(str(key), _STORAGES[dtype], int(count))


def _plain(value: Any) -> Any:
    """``value`` with stand-ins replaced by what they stand for."""
    if isinstance(value, _Array):
        return _plain(value.value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _read_zip(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise _Refused("is a zip file, but not one that torch.save wrote: no data.pkl in it")
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise _Refused("is compressed, which torch.save never does")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in entries:
            raise _Refused("is a TorchScript archive; save module.state_dict() instead")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("was written on a big-endian machine")
        cache: dict[str, np.ndarray] = {}

        def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
            if key not in cache:
                cache[key] = np.frombuffer(archive.read(f"{root}data/{key}"), np.uint8)
            data = cache[key].view(dtype)
            if len(data) < count:
                raise ValueError(f"storage {key} has {len(data)} of {count} elements")
            return data

        return _plain(_Unpickler(io.BytesIO(archive.read(pickles[0])), _TORCH, storage).load())


def _read_legacy(file: BinaryIO, size: int) -> Any:
    if _Unpickler(file, {}).load() != _LEGACY_MAGIC:
        raise _Refused("is a pickle, but not one that torch.save wrote")
    for _ in range(2):  # version of the protocol; sizes of C types
        _Unpickler(file, {}).load()
    storages: dict[str, np.ndarray] = {}

    def storage(key: str, dtype: np.dtype, count: int) -> np.ndarray:
        if not 0 <= count * dtype.itemsize <= size:
            raise ValueError(f"storage {key} of {count} elements in a file of {size} bytes")
        return storages.setdefault(key, np.zeros(count, dtype))  # filled below

    value = _Unpickler(file, _TORCH, storage).load()
    keys = [str(key) for key in _Unpickler(file, {}).load()]
    if set(keys) != set(storages):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        data = storages[key]
        if count != len(data):
            raise ValueError(f"storage {key} has {count} of {len(data)} elements")
        data.view(np.uint8)[:] = np.frombuffer(file.read(data.nbytes), np.uint8)
    return _plain(value)


def read_numpy_pickle(path: Path) -> Any:
    """What ``numpy.save`` or ``pickle`` wrote of nested containers of NumPy arrays."""

    def read() -> Any:
        with open(path, "rb") as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                file.seek(0)
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise _Refused(f"is in NumPy format {version}, which holds no pickle")
                if np.lib.format.read_array_header_1_0(file)[2] != np.dtype(object):
                    raise _Refused("is a NumPy array, not a pair of parameters and state")
            else:
                file.seek(0)
            return _plain(_Unpickler(file, _NUMPY).load())

    return _guarded(path, read)
