"""Devices: the mesh, the three data-parallel back ends, and the one place where they reduce.

The same pure functions run on one device or many. :func:`data_parallel` splits the example axis of
some arguments over a mesh:

========= ======================================================= =============================
backend   how                                                     batch statistics
========= ======================================================= =============================
jit       one global program, partitioned by XLA (the default)    of the global batch
shard_map one program for each device; loops end on their own     of the device, unless the model
                                                                  names ``axis_name="data"``
pmap      the same in the older interface                         as shard_map
========= ======================================================= =============================

Attacks and votes do not communicate, so ``shard_map`` lets every device leave its loops early.

Meshes of your own serve as well, their axes automatic or explicit: attacks, votes and training
steps compute where their arguments are, in ``jax.set_mesh`` or not.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
Backend = Literal["jit", "shard_map", "pmap"]

_inside: contextvars.ContextVar[bool] = contextvars.ContextVar("_inside", default=False)


def mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over ``devices`` (all of them when None), axis ``"data"``.

    Its axis is automatic: XLA decides how each array in between is split.
    """
    devices = jax.devices() if devices is None else list(devices)
    if not devices:
        raise ValueError("a mesh needs at least one device")
    return jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)


_all_devices = mesh  # where an argument hides the name


def _carries(leaf: Any) -> bool:
    """Whether an array carries in its type how it is split."""
    return isinstance(leaf, jax.Array) and bool(jax.typeof(leaf).sharding.mesh.explicit_axes)


def _explicit(tree: Any) -> AbstractMesh:
    """The mesh in context, or the one that arrays carry where that has no explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.explicit_axes:
        return mesh
    return next((jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree) if _carries(x)), mesh)


def by_rows(fn: Callable[..., Any], models: Any, x: Any, *args: Any, **static: Any) -> Any:
    """``fn(models, x, *args)``, arrays that start with the example axis of x, on any mesh.

    The axes of ``jax.make_mesh`` are explicit: arrays carry their splitting in their types, and JAX
    refuses what does not say how its result is split. In ``fn`` they are automatic, and so they are
    in ``models``, pytrees; where these are plain functions, which may have closed over arrays that
    carry theirs, they stay explicit in them. Results are split as the rows of x are.
    """
    mesh = _explicit((models, x, args))
    axes = mesh.explicit_axes
    if not axes:
        return fn(models, x, *args, **static)
    split = jax.typeof(x).sharding.spec
    rows = split[0] if split else None

    def shown(leaf: Any) -> Any:
        if not callable(leaf):
            return leaf
        spec = P(rows, *(None,) * (x.ndim - 1))
        return jax.tree_util.Partial(jax.sharding.explicit_axes(leaf, axes=axes, in_sharding=spec))

    out = NamedSharding(mesh, P(rows))
    inside = jax.sharding.auto_axes(fn, axes=axes, out_sharding=out)
    return inside(jax.tree.map(shown, models), x, *args, **static)


def by_state(fn: Callable[..., Any], state: Any, *args: Any) -> Any:
    """``fn(state, *args) -> (state, others)`` likewise: split as it was, and whole."""
    mesh = _explicit((state, args))
    if not mesh.explicit_axes:
        return fn(state, *args)
    kept = jax.tree.map(lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), state)
    out = kept, NamedSharding(mesh, P())
    return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=out)(state, *args)


def automatic(mesh: Mesh | None) -> Mesh:
    """The same devices and axes, all automatic; that of all devices when None."""
    if mesh is None:
        return _all_devices()
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _swapped(tree: Any, which: Callable[[Any], bool], fn: Callable[[Any], Any]) -> Any:
    """``tree`` with ``fn`` of its leaves that are ``which``; itself, as it is, if none is."""
    if not any(map(which, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda leaf: fn(leaf) if which(leaf) else leaf, tree)


def plain(tree: Any) -> Any:
    """``tree`` with arrays that do not carry their splitting in their types, where they are."""

    def ours(leaf: Any) -> Any:
        mesh = automatic(leaf.sharding.mesh)
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))

    return _swapped(tree, _carries, ours)


def home(tree: Any) -> Mesh | None:
    """The mesh of ``jax.set_mesh``, or that of arrays which carry theirs; None in traces."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return None
    if not mesh.empty:
        return mesh
    return next((leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if _carries(leaf)), None)


@contextlib.contextmanager
def apart(mesh: Mesh | None) -> Iterator[Callable[[Any], Any]]:
    """Outside of the mesh of :func:`home`; yields what takes arrays back to it.

    Programs over a mesh of their own do not run inside of another's context.
    """
    if mesh is None:
        yield lambda tree: tree
        return

    def placed(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)

    def there(leaf: Any) -> Any:
        same = leaf.sharding.mesh.axis_names == mesh.axis_names
        return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec if same else P()))

    def back(tree: Any) -> Any:
        return _swapped(tree, placed, there)

    with jax.set_mesh(None):
        yield back


def is_main() -> bool:
    """Whether this is the one process, of several, that writes files and shows progress."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jrobust {name}")


def agree(decision: bool) -> bool:
    """What the main process decided, on every process."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(decision)))


def fetch(tree: Any) -> Any:
    """Arrays as numpy arrays, whole on every process, however they are split.

    Where several processes hold parts of an array, all of them must call this.
    """

    def host(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(host, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Arrays, equal on all processes, copied to every device of ``mesh``."""
    sharding = NamedSharding(mesh, P())
    return jax.tree.map(lambda leaf: _place(leaf, sharding), tree)


def local(tree: Any) -> Any:
    """Arrays that all processes hold whole, as ordinary arrays of this one."""

    def ours(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = ours(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jnp.asarray(leaf.addressable_data(0))

    return jax.tree.map(ours, tree)


def free_memory(mesh: Mesh) -> int:
    """Bytes that programs may use on each device of this process.

    Nine tenths of what the device reports as free; on the CPU, half of the machine's available
    memory, shared by its devices.
    """
    devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in one for one in stats):
        return int(0.9 * min(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in stats))
    return _available() // 2 // len(devices)


def _available() -> int:
    """Bytes of the machine that are free, or would be if the system dropped its caches."""
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _place(leaf: Any, sharding: NamedSharding) -> Any:
    """``leaf``, equal on all processes, on the devices of ``sharding``."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return leaf if leaf.sharding == sharding else jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = _place(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Every process fills its own devices; nothing is sent.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@contextlib.contextmanager
def _per_device() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


def _spec(axis: int | None) -> P:
    if axis not in (0, None):
        raise ValueError(f"in_axes and out_axes hold 0 (split) or None (replicated), got {axis!r}")
    return P() if axis is None else P(AXIS)


def _size(args: Sequence[Any], axes: Sequence[int | None], devices: int) -> None:
    for arg, axis in zip(args, axes):
        for leaf in jax.tree.leaves(arg) if axis == 0 else ():
            if np.ndim(leaf) == 0 or np.shape(leaf)[0] % devices:
                raise ValueError(
                    f"an array of shape {np.shape(leaf)} cannot be split over {devices} devices: "
                    "its first axis must be a multiple of them; pad the batch (the loops do)"
                )


class DataParallel:
    """A function split over the devices of a mesh; made by :func:`data_parallel`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        mesh: Mesh,
        backend: Backend,
        in_axes: tuple[int | None, ...],
        out_axes: int | None,
        donate_argnums: tuple[int, ...],
    ) -> None:
        self.mesh, self.in_axes, self._pmapped = mesh, in_axes, backend == "pmap"
        self._out_axis = out_axes
        specs, out = tuple(map(_spec, in_axes)), _spec(out_axes)

        def local(*args: Any) -> Any:
            with _per_device():
                return fn(*args)

        if backend == "jit":
            self._program: Any = jax.jit(
                fn,
                in_shardings=tuple(NamedSharding(mesh, s) for s in specs),
                out_shardings=NamedSharding(mesh, out),
                donate_argnums=donate_argnums,
            )
        elif backend == "shard_map":
            self._program = jax.jit(
                jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out),
                donate_argnums=donate_argnums,
            )
        elif backend == "pmap":
            if mesh.is_multi_process:
                raise ValueError(
                    "pmap splits over the devices of one process, and this mesh has those of "
                    "several: use backend='jit' or 'shard_map'"
                )
            self._program = jax.pmap(
                local,
                AXIS,
                in_axes=in_axes,
                out_axes=out_axes,
                devices=list(mesh.devices.flat),
                donate_argnums=donate_argnums,
            )
        else:
            raise ValueError(f"backend must be 'jit', 'shard_map' or 'pmap', got {backend!r}")

    def put(self, *args: Any) -> tuple[Any, ...]:
        """``args`` where the program wants them: split or copied over the devices."""
        if len(args) != len(self.in_axes):
            raise TypeError(f"expected {len(self.in_axes)} arguments, got {len(args)}")
        _size(args, self.in_axes, self.mesh.size)
        if self._pmapped:
            return tuple(
                jax.tree.map(self._fold, arg) if axis == 0 else arg
                for arg, axis in zip(args, self.in_axes)
            )
        shardings = [NamedSharding(self.mesh, _spec(axis)) for axis in self.in_axes]
        return tuple(
            jax.tree.map(lambda leaf, s=sharding: _place(leaf, s), arg)
            for arg, sharding in zip(args, shardings)
        )

    def _fold(self, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return leaf.reshape(self.mesh.size, leaf.shape[0] // self.mesh.size, *leaf.shape[1:])

    def _flat(self, out: Any) -> Any:
        if not self._pmapped or self._out_axis is None:
            return out
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)

    def __call__(self, *args: Any) -> Any:
        """Run on the whole batch."""
        with apart(home(args)) as back:
            return back(self._flat(self._program(*self.put(*args))))

    def lower(self, *args: Any) -> Callable[[], Compiled]:
        """Trace and lower for arguments like ``args``; the result compiles, in any thread."""
        with apart(home(args)):
            lowered = self._program.lower(*self.put(*args))
        return lambda: Compiled(self, lowered.compile())

    def compile(self, *args: Any) -> Compiled:
        """Compile ahead of time for arguments like ``args``; the result takes such arguments."""
        return self.lower(*args)()


class Compiled:
    """A compiled program over a mesh; made by :meth:`DataParallel.compile`.

    Attributes:
        bytes: memory that the program needs on each device: arguments, results and what it
            holds in between, as the compiler reports it.
    """

    def __init__(self, split: DataParallel, program: Any) -> None:
        self._split, self._program = split, program
        sizes = program.memory_analysis()
        self.bytes = int(
            sizes.argument_size_in_bytes
            + sizes.output_size_in_bytes
            + sizes.temp_size_in_bytes
            - sizes.alias_size_in_bytes
        )

    def __call__(self, *args: Any) -> Any:
        """Run on the whole batch."""
        with apart(home(args)) as back:
            return back(self._split._flat(self._program(*self._split.put(*args))))


def data_parallel(
    fn: Callable[..., Any],
    mesh: Mesh | None = None,
    backend: Backend = "jit",
    *,
    in_axes: int | Sequence[int | None] | None = 0,
    out_axes: int | None = 0,
    donate_argnums: int | Sequence[int] = (),
) -> DataParallel:
    """``fn`` over a batch that is split over devices.

    Args:
        fn: pure function of pytrees. Under ``shard_map`` and ``pmap`` it sees one device's rows,
            and what it returns unsplit must be equal on all devices: only
            :func:`value_and_grad` makes it so.
        mesh: from :func:`mesh`; all devices when None.
        backend: see the module.
        in_axes: for each argument 0 (leaves are split along their first axis) or None (copied).
        out_axes: the same for the result as a whole.
        donate_argnums: arguments whose buffers may be reused, as in ``jax.jit``.

    Raises:
        ValueError: for an unknown back end or axis, and when called with a batch that is not a
            multiple of the number of devices.
    """
    mesh = automatic(mesh)
    if AXIS not in mesh.axis_names or mesh.size != mesh.shape[AXIS]:
        raise ValueError(f"the mesh must have the one axis {AXIS!r}, got {dict(mesh.shape)}")
    if isinstance(in_axes, Sequence):
        axes = tuple(in_axes)
    else:
        axes = (in_axes,) * len(inspect.signature(fn).parameters)
    donate = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
    return DataParallel(fn, mesh, backend, axes, out_axes, donate)


def value_and_grad(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.value_and_grad(fn, has_aux=True)`` of the whole batch, whatever back end runs it.

    ``fn(params, *args) -> (loss, aux)`` gives means over its rows. The result takes one keyword
    more, ``weight``: how many rows those are. Where each device sees its own rows, the loss, its
    gradients and all floating leaves of ``aux`` are averaged over devices by weight, so that the
    outcome is that of the global batch. (``pmean`` of the gradient of a local loss is N times too
    large under ``shard_map`` and right under ``pmap``; here both are right.)
    """

    def reduced(params: Any, *args: Any, weight: Any) -> Any:
        if not _inside.get():
            return jax.value_and_grad(fn, has_aux=True)(params, *args)
        weight = jnp.asarray(weight, jnp.float32)
        share = weight / jnp.maximum(jax.lax.psum(weight, AXIS), 1e-30)
        # Marked as different on every device, so that their gradients stay local until reduced.
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, AXIS, to="varying"), params)

        def part(params: Any) -> Any:
            # Weighted before it is differentiated: where batch-norm communicates, a device's loss
            # depends on the rows of others.
            value, aux = fn(params, *args)
            return share * value, aux

        (value, aux), grads = jax.value_and_grad(part, has_aux=True)(params)

        def mean(leaf: Any) -> Any:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return jax.lax.psum(share * leaf.astype(jnp.float32), AXIS).astype(leaf.dtype)

        value, grads = jax.tree.map(lambda leaf: jax.lax.psum(leaf, AXIS), (value, grads))
        return (value, jax.tree.map(mean, aux)), grads

    return reduced
