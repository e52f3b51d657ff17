"""Exact differences: every rule against float64, networks, slabs, loops, what XLA makes of it."""

import functools
import pathlib
import re
import warnings
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jrobust import losses, models
from jrobust.models import _networks as resnets
from jrobust.zeroth_order import _difference_rules as rules
from jrobust.zeroth_order._difference import (
    DifferenceWarning,
    OneHot,
    difference,
    differencer,
)

SIZES = np.float32([1e-6, 0.3])


def draw(seed, *shape, positive=False):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return np.abs(x) + np.float32(1.5) if positive else x


def wide(tree):
    return jax.tree.map(
        lambda a: np.asarray(a, np.float64) if np.issubdtype(a.dtype, np.floating) else a, tree
    )


def rows(tree):
    """(rows, all the numbers in a row) of a pytree of arrays with a common first axis."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def truth(f, args, moves):
    """Rows of f(x + dx) - f(x), all in float64; each of ``moves`` has a first axis of rows."""
    with jax.enable_x64(True):
        fn = jax.jit(jax.vmap(lambda ds: f(*jax.tree.map(lambda a, d: a + d, wide(args), ds))))
        padded = jax.tree.map(lambda d: np.concatenate([0 * d[:1], d]), wide(moves))
        values = rows(fn(padded))
    return values[1:] - values[:1]


def error(got, wanted):
    """The largest relative error of a row, in norm."""
    got = rows(got)
    assert got.shape == wanted.shape
    size = np.linalg.norm(wanted, axis=1)
    assert size[0] > 0, "nothing moved: the case tests nothing"
    wrong = np.linalg.norm(got - wanted, axis=1)
    assert np.all(wrong[size == 0] == 0)
    return np.max(wrong[size > 0] / size[size > 0])


def spectrum(x):
    z = jnp.fft.fft(x)
    z = z * jnp.conj(z) / (2 + jnp.abs(z)) * lax.complex(x, 2 * x) + jnp.where(x > 0.1, z, 2 * z)
    return jnp.abs(z) + jnp.imag(z) * jnp.fft.ifft(z).real


NORMAL, POSITIVE = draw(0, 4, 6), draw(1, 4, 6, positive=True)
OTHER = draw(2, 4, 6)
IMAGE, KERNEL = draw(3, 2, 5, 6, 3), 0.3 * draw(4, 3, 2, 3, 4)
ALL = jax.sharding.SingleDeviceSharding(jax.devices()[0])
NEARLY = np.float32(0.99) * NORMAL[:, 0]  # so that small changes move an argmax
CLOSE = np.float32(1) + np.round(4 * NORMAL) * np.float32(2**-23)  # a few roundings from 1
INDEX = np.int32([[1, 3], [0, 2]])
BYTES = np.full((6, 6), 3, np.int8)


def conv(lhs, rhs, **how):
    how = {"window_strides": (1, 1), "padding": "SAME", **how}
    return lax.conv_general_dilated(lhs, rhs, dimension_numbers=("NHWC", "HWIO", "NHWC"), **how)


def pool(x, fill, op):
    return lax.reduce_window(
        x, fill, op, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (0, 1), (0, 0))
    )


# Primitives -> function and arguments. The same primitive may be there again, with a colon.
CASES = {
    "add": (lax.add, NORMAL, OTHER),
    "sub": (lax.sub, NORMAL, OTHER),
    "neg": (lax.neg, NORMAL),
    "add_any": (jax.grad(lambda x: jnp.sum(x * jnp.sin(x))), NORMAL),
    "mul": (lax.mul, NORMAL, OTHER),
    "mul:itself": (lambda x: x * x, NORMAL),
    "mul:broadcast": (lambda x, g: x * g, NORMAL, OTHER[:1]),
    "div": (lax.div, NORMAL, POSITIVE),
    "max": (lax.max, NORMAL, OTHER),
    "max:kink": (lambda x: lax.max(x * 1e-6, 0.0), NORMAL),
    "max:infinite": (
        lambda a, b: jnp.exp(
            lax.max(jnp.where(OTHER > 0, a, -np.inf), jnp.where(NORMAL > 0, b, -np.inf))
        ),
        NORMAL,
        OTHER,
    ),
    "min": (lax.min, NORMAL, OTHER),
    "clamp": (lax.clamp, NORMAL - 1, OTHER, POSITIVE),
    "abs": (lax.abs, NORMAL),
    "exp": (lax.exp, NORMAL),
    "exp:from nothing": (lambda x: x + jnp.exp(jnp.minimum(1e3 * x - 200, 20)), 0 * NORMAL),
    "exp:stays infinite": (lambda x: x + 1 / (1 + jnp.exp(-100 * x)), 5 * np.sign(NORMAL)),
    "exp2": (lax.exp2, NORMAL),
    "expm1": (lax.expm1, NORMAL),
    "log": (lax.log, POSITIVE),
    "log:stays infinite": (lambda x: jnp.max(jnp.log(x * (OTHER > 0)), 1), POSITIVE),
    "log1p": (lax.log1p, POSITIVE - 1),
    "logistic": (lambda x: lax.logistic(4 * x), NORMAL),
    "logistic:far": (lambda x: x + lax.logistic(300 * x), NORMAL),
    "tanh": (lambda x: lax.tanh(3 * x), NORMAL),
    "erf": (lambda x: lax.erf(2 * x), NORMAL),
    "erf:far": (lambda x: lax.erf(20 * x), NORMAL),
    "erfc": (lambda x: lax.erfc(2 * x), NORMAL),
    "sin": (lax.sin, NORMAL),
    "cos": (lax.cos, NORMAL),
    "sqrt": (lax.sqrt, POSITIVE),
    "sqrt:zero": (lambda x: jnp.sqrt(x * x), np.round(NORMAL)),
    "rsqrt": (lax.rsqrt, POSITIVE),
    "square": (lax.square, NORMAL),
    "integer_pow": (lambda x: x**3, NORMAL),
    "integer_pow:negative": (lambda x: lax.integer_pow(x, -2), POSITIVE),
    "pow": (lax.pow, POSITIVE, OTHER),
    "pow:negative base": (lambda x: lax.pow(x, jnp.full_like(x, 3)), NORMAL),
    "select_n": (lambda a, b: jnp.where(a > 0, a * b, 2 * b), NORMAL, OTHER),
    "select_n:booleans": (
        lambda a, b: jnp.where(jnp.where(a > 0.1, a > b, b > a), 3 * a, -2 * b),
        NORMAL,
        OTHER,
    ),
    "eq:maximum": (lambda x: jax.grad(lambda z: jnp.sum(jnp.max(z * z, 1) ** 2))(x), NORMAL),
    "eq ne is_finite": (
        lambda a, b: jnp.where(a == a, a, b) + jnp.where((a != b) & jnp.isfinite(b), a, 3 * b),
        NORMAL,
        OTHER,
    ),
    "lt le gt ge": (
        lambda a, b: (
            jnp.where(1e-6 * a < 0, a, 3 * b)
            + jnp.where(a <= b, 2 * a, 5 * b)
            + jnp.where(a > 0.1, 7 * a, 4 * b)
            + jnp.where(1e-6 * a >= -1e-7, 9 * a, 6 * b)
        ),
        NORMAL,
        OTHER,
    ),
    "and or xor not": (
        lambda x: (
            jnp.where((x > 0.1) & (x < 1), x, 0)
            + jnp.where((x < 0.2) | (x > 1), 3 * x, 0)
            + jnp.where(~(x < 0.3) ^ (x > 1), 5 * x, 0)
        ),
        NORMAL,
    ),
    "sign floor ceil round": (
        lambda x: jnp.sign(x - 0.1) + jnp.floor(5 * x) + 3 * jnp.ceil(4 * x) + jnp.round(7 * x) + x,
        NORMAL,
    ),
    "copy stop_gradient name reduce_precision sharding_constraint": (
        lambda x: (
            2 * jnp.array(x, copy=True)
            + 3 * lax.stop_gradient(x)
            + 4 * checkpoint_name(x, "a")
            + 5 * lax.reduce_precision(x, 11, 52)
            + 6 * lax.with_sharding_constraint(x, ALL)
        ),
        NORMAL,
    ),
    "optimization_barrier": (lambda a, b: sum(lax.optimization_barrier((a, b))), NORMAL, OTHER),
    "transpose rev slice squeeze": (
        lambda x: (
            jnp.tanh(x.T[::2, 1:3])
            + jnp.tanh(x[1:3, 5::-2].T) * lax.squeeze(x[:1, :3], (0,))[:, None]
        ),
        NORMAL,
    ),
    "gt:close": (lambda a, b: jnp.where(a > b, 3 * (a - b), b - a), CLOSE, np.ones_like(CLOSE)),
    "gt:tiny": (lambda a: (1e-7 * a > 0).astype(a.dtype) + a, NORMAL),
    "reduce_max": (lambda x: jnp.max(x, 0), NORMAL),
    "reduce_max:infinite": (
        lambda x: jnp.exp(jnp.max(jnp.where(np.arange(4)[:, None] > 0, x, -np.inf), 1)),
        NORMAL,
    ),
    "reduce_max:ties": (lambda x: jnp.max(x, 0), np.round(NORMAL)),
    "reduce_min": (lambda x: jnp.min(x, 1), NORMAL),
    "argmax": (lambda x: jnp.argmax(x * 0.3, 0) + x[0], NORMAL),
    "argmin": (lambda x: jnp.argmin(x * 0.3, 1) + x[:, 0], NORMAL),
    "reduce_window_max": (lambda x: pool(x, -np.inf, lax.max), IMAGE),
    "reduce_window_min": (lambda x: pool(x, np.inf, lax.min), IMAGE),
    "reduce_window_sum": (lambda x: pool(x, 0.0, lax.add), IMAGE),
    "reduce_window_max:channels": (
        lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 2), (1, 1), "VALID"),
        NORMAL,
    ),
    "reduce_sum": (lambda x: jnp.sum(x, 0), NORMAL),
    "reduce_sum:last": (lambda x: jnp.sum(x, -1), NORMAL),
    "cumsum": (lambda x: lax.cumsum(x, 0), NORMAL),
    "cumsum:last": (lambda x: lax.cumsum(x, 1, reverse=True), NORMAL),
    "reshape": (lambda x: x.reshape(2, 2, 6) ** 2, NORMAL),
    "reshape:shuffle": (lambda x: jnp.tanh(x.reshape(6, 4)), NORMAL),
    "reshape:merge": (lambda x: jnp.tanh(x.reshape(-1)), NORMAL),
    "broadcast_in_dim": (lambda x: jnp.broadcast_to(x[:, None], (4, 3, 6)) ** 2, NORMAL),
    "pad": (lambda x, v: jnp.tanh(lax.pad(x, v, ((1, -1, 1), (0, 2, 0)))), NORMAL, NORMAL[0, 0]),
    "concatenate": (lambda a, b: jnp.tanh(jnp.concatenate([a, b])), NORMAL, OTHER),
    "stack": (lambda a, b: jnp.tanh(jnp.stack([a, b])), NORMAL, OTHER),
    "unstack": (lambda x: jnp.tanh(sum(jnp.unstack(x))), NORMAL),
    "split": (lambda x: jnp.multiply(*jnp.split(x, 2)), NORMAL),
    "tile": (lambda x: jnp.tile(x, (2, 1)) * 2, NORMAL),
    "convert_element_type": (lambda x: (x > 0.1).astype(x.dtype) * x + (9 * x).astype(int), NORMAL),
    "convert_element_type:bytes": (  # differences of bytes wrap around
        lambda x: (
            x
            + (jnp.clip(x, 0, 1) * 255).astype(jnp.uint8).astype(x.dtype)
            + (99 * jnp.sign(x - 0.1)).astype(jnp.int8)
        ),
        NORMAL,
    ),
    "convert_element_type:truth": (
        lambda x: x + lax.convert_element_type((5 * x).astype(jnp.int32), jnp.bool_),
        NORMAL,
    ),
    "dot_general:bytes": (
        lambda x: (
            x
            + lax.dot((99 * jnp.sign(x)).astype(jnp.int8), BYTES, preferred_element_type=jnp.int32)
        ),
        NORMAL,
    ),
    "fft complex conj real imag": (spectrum, NORMAL),
    "gather:outside": (
        lambda x: jnp.take(x, np.array([0, 9, 2]), 0, mode="fill", fill_value=5.0) ** 2,
        NORMAL,
    ),
    "gather": (lambda x: jnp.tanh(jnp.take_along_axis(x, INDEX, 1, mode="clip")), NORMAL[:2]),
    "gather:moved": (lambda x: x[jnp.argmax(0.3 * x, 0), jnp.arange(6)] ** 2, NORMAL),
    "dynamic_slice": (
        lambda x: lax.dynamic_slice(x, (jnp.argmin(x[:, 0] - NEARLY), 1), (1, 3)),
        NORMAL,
    ),
    "dynamic_update_slice": (
        lambda x, u: lax.dynamic_update_slice(x, u, (jnp.argmin(x[:, 0] - NEARLY), 1)),
        NORMAL,
        OTHER[:1, :2],
    ),
    "scatter": (lambda x, u: x.at[INDEX[0]].set(u), NORMAL, OTHER[:2]),
    "scatter-add scatter-sub": (
        lambda x, u: x.at[INDEX[0]].add(u).at[INDEX[1]].subtract(3 * u),
        NORMAL,
        OTHER[:2],
    ),
    "dot_general": (lambda a, b: a @ b.T, NORMAL, OTHER),
    "dot_general:free": (lambda a, b: a.T @ b, NORMAL, OTHER),
    "dot_general:batch": (lambda a, b: jnp.einsum("nc,cn->cn", a, b.T), NORMAL, OTHER),
    "dot_general:attend": (lambda a, b: jnp.einsum("bhwc,bvwc->bwhv", a, b), IMAGE, IMAGE[:, :4]),
    "conv_general_dilated": (conv, IMAGE, KERNEL),
    "conv_general_dilated:strided": (
        lambda a, b: conv(
            a, b, window_strides=(2, 1), padding=((1, 0), (2, 1)), rhs_dilation=(1, 2)
        ),
        IMAGE,
        KERNEL,
    ),
    "conv_general_dilated:transposed": (
        lambda a, b: conv(a, b, lhs_dilation=(2, 1), padding=((2, 1), (0, 1))),
        IMAGE,
        KERNEL,
    ),
    "conv_general_dilated:grouped": (
        lambda a, b: conv(a, b, feature_group_count=3),
        IMAGE,
        KERNEL[:, :, :1, :3],
    ),
    "conv_general_dilated:layout": (
        lambda b, a: lax.conv_general_dilated(
            a, b, (1, 2), "VALID", dimension_numbers=("CWHN", "OHWI", "WNCH")
        ),
        KERNEL.transpose(3, 0, 1, 2),
        IMAGE.T,
    ),
}
# Exact to a few roundings where a case is one operation.
COARSE = {"gt:tiny": 1e-5}


def primitives(f, *args):
    names = set()

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            names.add(eqn.primitive.name)
            for value in jax.tree.leaves(
                tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
            ):
                if hasattr(value, "eqns"):
                    visit(getattr(value, "jaxpr", value))

    visit(jax.make_jaxpr(f)(*args).jaxpr)
    return names


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_exact_however_small_the_change(name):
    f, *args = CASES[name]
    assert set(name.split(":")[0].split()) <= primitives(f, *args)
    gain = np.ones((1,) * (args[0].ndim - 1) + args[0].shape[-1:], np.float32)
    n, count = gain.size, len(args)

    def scaled(gain, *args):
        return f(args[0] * gain, *args[1:])

    # All arguments at once, then each alone, by little and by much.
    patterns = np.concatenate([np.ones((1, count), bool), np.eye(count, dtype=bool)])[
        : count + (count > 1)
    ]
    directions = [draw(7 + i, *np.shape(a)) for i, a in enumerate(args)]

    @jax.jit
    def ours(args, index):
        _, delta = differencer(f, *args, strict=True)
        moves = [[d if it else None for d, it in zip(directions, on)] for on in patterns]
        found = [
            jax.vmap(lambda s, ds=ds: delta(*jax.tree.map(lambda d: s * d, ds)))(SIZES)
            for ds in moves
        ]
        # The change of a gain is a slab through the multiplication, and into f.
        _, delta = differencer(scaled, gain, *args, primal_dtype=jnp.float64, strict=True)
        one = lambda i: delta(OneHot((*(0,) * (gain.ndim - 1), i), 0.1), *[None] * count)  # noqa: E731
        found.append(jax.vmap(one)(index))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    each = [
        np.concatenate(
            [s * d[None] if it else 0 * d[None] for on in patterns for it in [on[i]] for s in SIZES]
            + [0 * d[None]] * n
        )
        for i, d in enumerate(directions)
    ]
    still = np.zeros((len(each[0]) - n, *gain.shape), np.float32)
    gains = np.concatenate(
        [still, np.float32(0.1) * np.eye(n, dtype=np.float32).reshape(n, *gain.shape)]
    )
    wanted = truth(scaled, (gain, *args), (gains, *each))
    found = ours(args, np.arange(n))
    assert error(found, wanted) < COARSE.get(name, 3e-6)


def test_every_rule_has_a_case():
    tables = (rules._POINTWISE, rules._ALONG, rules._IDENTITY, rules._LINEAR, rules._INDEXED)
    names = {name for table in (*tables, rules._PRODUCTS) for name in table}
    later = {"psum", "psum_invariant", "pvary"}  # in shard_map
    later |= {"log2", "one_minus_square"}  # newer JAX has these in PROGRAMS
    assert names - {word for name in CASES for word in name.split(":")[0].split()} == later


# --------------------------------------------------------------------------------- whole networks


class Attention(nn.Module):
    """Layer-norm, attention, GELU: (B, T, C) -> (B, 5)."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, dtype=x.dtype)(h, h)
        h = nn.gelu(nn.Dense(8)(nn.RMSNorm()(x)), approximate=False)
        return nn.Dense(5)(nn.silu(h).mean(1))


class Mixed(nn.Module):
    """Convolutions in one type, all else in float32."""

    dtype: Any = None
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x):
        if self.batch_norm:
            x = nn.BatchNorm(False, axis=-2)(x)
        for i in range(2):
            x = nn.Conv(6, (3, 3), dtype=self.dtype, name=f"conv{i}")(x).astype(jnp.float32)
            x = nn.relu(nn.GroupNorm(3)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(5)(x.reshape(len(x), -1))


IMAGES, LABELS = np.abs(draw(20, 6, 8, 8, 3)) / 3, np.arange(6) % 5
TINY = models.ResNet(depth=8, widths=(4, 6, 8), classes=5)
MUS = np.float32([5e-3, 1e-4, 1e-6])


def network(module, x, **how):
    """Parameters, jittered so that no two are equal, and the loss as a function of (them, x)."""
    seeds = iter(range(30, 1000))

    def filled(path, leaf):
        """Numbers of the usual sizes, no two equal."""
        scale = (leaf.size // leaf.shape[-1]) ** -0.5 if leaf.ndim > 1 else 0.2
        x = np.float32(scale) * draw(next(seeds), *leaf.shape)
        return x + 1 if any(name in str(path[-1]) for name in ("scale", "var")) else x

    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params, rest = (
        jax.tree_util.tree_map_with_path(filled, {k: v for k, v in variables.items() if it(k)})
        for it in ("params".__eq__, "params".__ne__)
    )
    params = params["params"]

    def loss(params, x=x):
        out = module.apply({"params": params, **rest}, x, **how)
        logits, new = out if "mutable" in how else (out, None)
        return losses.cross_entropy(logits, LABELS[: len(x)]).mean(), new

    return params, loss


def in_float64(loss, params, changes):
    """The loss at x + dx minus that at x, for pytrees dx with a first axis; casts lose no digit."""
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        x = wide(loss.__defaults__[0])
        fn = jax.jit(lambda d: loss(jax.tree.map(jnp.add, wide(params), d), x)[0])
        fn = jax.jit(functools.partial(lax.map, fn))
        values = np.asarray(
            fn(jax.tree.map(lambda d: np.concatenate([0 * d[:1], d]), wide(changes)))
        )
    assert values.dtype == np.float64
    return values[1:] - values[0]


def scattered(shape, index, mu):
    x = np.zeros((len(index[0]), *shape), np.float64)
    x[(np.arange(len(x)), *index)] = mu
    return x


def single_weights(loss, params, count, leaves):
    """``count`` random numbers of each of these leaves, and float64's (leaf, mu, count)."""
    flat_params, _ = jax.tree.flatten(params)
    rng = np.random.default_rng(5)
    picks = [tuple(rng.integers(n, size=count) for n in flat_params[k].shape) for k in leaves]
    change = [np.zeros((len(leaves), len(MUS), count, *p.shape), np.float32) for p in flat_params]
    for n, (k, index) in enumerate(zip(leaves, picks)):
        for m, mu in enumerate(MUS):
            change[k][n, m] = scattered(flat_params[k].shape, index, mu)
    change = [c.reshape(-1, *p.shape) for c, p in zip(change, flat_params)]
    wanted = in_float64(loss, params, jax.tree.unflatten(jax.tree.structure(params), change))
    return picks, wanted.reshape(len(leaves), len(MUS), count)


def our_single_weights(loss, params, leaves, picks, primal_dtype=jnp.float64):
    count, tree = len(jax.tree.leaves(params)), jax.tree.structure(params)

    @jax.jit
    def ours(params, x, picks):
        # The images as an argument: what depends on constants alone is computed while tracing.
        how = {"primal_dtype": primal_dtype, "strict": True, "has_aux": True}
        _, delta, _ = differencer(loss, params, x, **how)

        def one(k, index, mu):
            change = [OneHot(index, mu) if j == k else None for j in range(count)]
            return delta(jax.tree.unflatten(tree, change), None)

        def each(k, index):
            return jax.vmap(lambda mu: jax.vmap(lambda i: one(k, i, mu))(index))(MUS)

        return [each(k, index) for k, index in zip(leaves, picks)]

    return np.asarray(ours(params, loss.__defaults__[0], picks), np.float64)


def by_size(found, wanted):
    """The relative error for each mu, in norm."""
    return np.linalg.norm(found - wanted, axis=(0, 2)) / np.linalg.norm(wanted, axis=(0, 2))


NETWORKS = {
    "resnet": lambda: network(TINY, IMAGES, train=False),
    "resnet in training": lambda: network(TINY, IMAGES, train=True, mutable=["batch_stats"]),
    "attention": lambda: network(Attention(), IMAGES.reshape(6, 16, 12)),
    "pooling": lambda: network(Mixed(), IMAGES),
}


@pytest.mark.parametrize(
    "name",
    ["resnet in training"]
    + [pytest.param(name, marks=pytest.mark.full) for name in ("resnet", "attention", "pooling")],
)
def test_networks_are_exact_for_changes_of_any_size(name):
    params, loss = NETWORKS[name]()
    n = len(jax.tree.leaves(params))
    leaves = [n // 3, n - 1]
    picks, wanted = single_weights(loss, params, 3, leaves)
    assert np.all(by_size(our_single_weights(loss, params, leaves, picks), wanted) < 5e-6)


@pytest.mark.full
@pytest.mark.parametrize("train", [False, True])
def test_resnet_20_at_cifar_shape(train):
    """The figures of docs/difference.md: weights of every kind, at a tenth of the leaves."""
    x = np.abs(draw(21, 4, 32, 32, 3)) / 3
    module = models.ResNet(classes=5)
    how = {"train": True, "mutable": ["batch_stats"]} if train else {"train": False}
    params, loss = network(module, x, **how)

    def half(params, x=x):
        """With bfloat16 convolutions."""
        conv = functools.partial(resnets._conv, dtype=jnp.bfloat16)
        with mock.patch.object(resnets, "_conv", conv):
            return loss(params, x)

    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    kinds = ("['head']['bias']", "['head']['kernel']", "['conv']['kernel']", "['norm']['scale']")
    kinds += tuple(
        f"['stage{i}_block2']['{part}']"
        for i, part in [
            (1, "conv1']['kernel"),
            (2, "conv2']['kernel"),
            (3, "conv1']['kernel"),
            (2, "norm1']['bias"),
        ]
    )
    leaves = [names.index(kind) for kind in kinds]
    picks, wanted = single_weights(loss, params, 25, leaves)
    for primal, f, bound in (
        (jnp.float64, loss, 1e-5),
        (None, loss, 1e-3),
        (jnp.float64, half, 5e-3),
    ):
        found = our_single_weights(f, params, leaves, picks, primal)
        least = 0.01 * np.sqrt(
            np.mean(wanted**2, axis=(0, 2), keepdims=True)
        )  # dead neurons give 0
        each = np.abs(found - wanted) / np.maximum(np.abs(wanted), least)
        print(train, primal, f.__name__, by_size(found, wanted))
        print(np.quantile(each, [0.5, 0.9, 1], axis=(0, 2)))
        assert np.all(by_size(found, wanted)[:2] < bound)


def test_half_precision_convolutions_keep_the_difference():
    """Two subtracted losses in bfloat16 keep nothing; here each layer costs a rounding."""
    params, loss = network(Mixed(jnp.bfloat16), IMAGES)
    _, full = network(Mixed(), IMAGES)
    leaves = [[p.shape for p in jax.tree.leaves(params)].index((3, 3, 3, 6))]
    picks, wanted = single_weights(full, params, 16, leaves)
    wrong = by_size(our_single_weights(loss, params, leaves, picks), wanted)
    assert np.all(wrong < 5e-3)
    assert np.all(wrong > 1e-5), "otherwise these are no convolutions in bfloat16"


def test_float16_products_keep_small_changes():
    """They would vanish in it: 6e-8 is its smallest number."""
    x, dw = OTHER.astype(np.float16), 1e-9 * draw(41, 6, 3)
    _, delta = differencer(lambda w: jnp.asarray(x) @ w.astype(jnp.float16), draw(42, 6, 3))
    np.testing.assert_allclose(delta(dw), x.astype(np.float64) @ dw, rtol=1e-4)


def test_a_float64_base_pass_tells_apart_what_float32_does_not():
    """Both sides of the comparison are 1 in float32."""

    def f(z):
        a = 1 + 1e-9 * z
        return jnp.where(a > jnp.ones_like(a), 10.0 * z, -z)

    z, dz = np.float32([1, -1, 1, 1, -1]), np.float32([1e-3, 1e-3, 0, -3, 1.5])
    _, delta = differencer(f, z, primal_dtype=jnp.float64)
    assert error(delta(dz)[None], truth(f, [z], [dz[None]])) < 1e-6


def test_long_ways_to_nearly_nothing():
    root = lambda x: lax.pow(x, jnp.full_like(x, 2**-5))  # noqa: E731
    for f, x, d in ((jnp.log, 3, -2.999999), (jnp.square, 1.1, -2.2000005), (root, 3, -2.999999)):
        x, d = np.float32(x), np.float32(d)
        assert error(difference(f)(x, d)[1][None], truth(f, [x], [d[None]])) < 1e-6


def test_a_float64_base_pass_is_right_across_kinks():
    """Pre-activations near 0 by cancellation: in float32 they are off by more than the change."""
    a = 1 + 1e-8 * draw(40, 2000).astype(np.float64)
    x = np.stack([a.astype(np.float32), (a - a.astype(np.float32)).astype(np.float32)])
    w = np.float32([[1], [1], [-1]])

    def f(w):
        return jnp.sum(jnp.square(jax.nn.relu(w[0] * x[0] + w[1] * x[1] + w[2])))

    dw = np.float32([[0], [0], [1e-9]])
    wanted = truth(f, [w], [dw[None]])
    errors = {}
    for dtype in (None, jnp.float32, jnp.float64):
        _, delta = jax.jit(lambda w, dtype=dtype: differencer(f, w, primal_dtype=dtype))(w)
        errors[dtype] = error(delta(dw)[None], wanted)
    assert errors[jnp.float64] < 1e-5
    assert errors[None] > 0.5


def test_it_tends_to_the_derivative():
    params, loss = network(Mixed(batch_norm=True), IMAGES, mutable=["batch_stats"])
    mu = 1e-9

    @jax.jit
    def both(params, direction):
        _, delta, aux = differencer(loss, params, has_aux=True)
        _, slope, wanted = jax.jvp(loss, (params,), (direction,), has_aux=True)
        return delta(jax.tree.map(lambda d: mu * d, direction)) / mu, slope, aux, wanted

    quotient, slope, *statistics = both(params, jax.tree.map(jnp.cos, params))
    np.testing.assert_allclose(quotient, slope, rtol=1e-5)
    chex.assert_trees_all_close(*statistics, rtol=1e-6)


# --------------------------------------------------------------------------- loops, calls, fallback


@jax.custom_vjp
def wrong_gradient(x):
    return jnp.sin(x)


wrong_gradient.defvjp(lambda x: (x, None), lambda _, g: (0 * g,))


@jax.custom_batching.custom_vmap
def doubled(x):
    return 2 * x


doubled.def_vmap(lambda size, batched, x: (2 * x, batched[0]))


def recurrent(x, w):
    def turn(carry, row):
        h, step, top = carry
        h = jnp.tanh(h @ w + row)
        return (h, step + 1, jnp.maximum(top, jnp.argmax(h))), jnp.max(h) * step

    return lax.scan(turn, (jnp.zeros(6), 0, 0), x, reverse=True)


def counted(x, w):
    """A while loop of three turns; the third carry begins to move in the second turn."""

    def turn(s):
        return s[0] + 1, s[1] @ w, s[2] + jnp.sum(s[1])

    return lax.while_loop(lambda s: s[0] < 3, turn, (0, x, 0.0))[1:]


def branch(x, w):
    low = lax.cond(LABELS[1] > 0, lambda x: jnp.tanh(x) @ w, lambda x: x @ w, x)
    return low + lax.switch(2, [jnp.sin, jnp.cos, jnp.exp], x)


WEIGHTS = draw(50, 6, 6) / 3
PROGRAMS = {
    "scan": recurrent,
    "while": counted,
    "cond": branch,
    "while under vmap": lambda x, w: jax.vmap(
        lambda row, n: lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] @ w), (0, row))
    )(x, np.arange(4)),
    "jit": lambda x, w: jax.jit(lambda a: jnp.exp(a))(x @ w),
    "remat": lambda x, w: jax.checkpoint(lambda a: jnp.sin(a @ w))(x),
    "custom_jvp": lambda x, w: jax.nn.relu(x @ w) + jax.nn.silu(x),
    "custom_vjp": lambda x, w: wrong_gradient(x @ w),
    "custom_vmap": lambda x, w: doubled(x @ w),
    "gradient": lambda x, w: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w) ** 2))(x),
    "scan over layers": lambda x, ws: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0],
    "logarithm": lambda x, w: jnp.log2(2 + (x @ w) ** 2),
    "logits": lambda x, w: -jax.nn.log_softmax(x @ w)[jnp.arange(4), INDEX.ravel()],
    "masked": lambda x, w: jax.nn.logsumexp(jnp.where(OTHER > 0, x @ w, -jnp.inf), 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_loops_branches_and_calls(name):
    f, primal = PROGRAMS[name], jnp.float64 if name in ("scan", "while", "cond") else None
    x, w = NORMAL, np.stack([WEIGHTS, WEIGHTS.T]) if "layers" in name else WEIGHTS
    dx, dw = draw(60, *x.shape), draw(61, *w.shape)

    @jax.jit
    def ours(x, w):
        y, delta = differencer(f, x, w, primal_dtype=primal, strict=True)
        moves = jax.vmap(lambda s: delta(s * dx, s * dw))(SIZES)
        still = delta(None, None)
        chex.assert_trees_all_equal_shapes_and_dtypes(y, still)
        return y, [moves, delta(OneHot((1, 2), 0.1), None), delta(None, 1e-6 * dw)], still

    y, (moves, one, alone), still = ours(x, w)
    chex.assert_trees_all_close(y, f(x, w), rtol=2e-5)
    assert not np.any(rows(jax.tree.map(lambda a: a[None], still)))
    found = jax.tree.map(lambda m, *rest: np.stack([*m, *rest]), moves, one, alone)
    change_x = np.stack(
        [*(s * dx for s in SIZES), scattered(x.shape, ([1], [2]), np.float32(0.1))[0], 0 * x]
    )
    change_w = np.stack([*(s * dw for s in SIZES), 0 * w, np.float32(1e-6) * dw])
    assert error(found, truth(f, (x, w), (change_x, change_w))) < 1e-5


def test_what_a_loop_does_not_change_stays_a_symbolic_zero():
    """Rows that do not see the change are not computed: one product of matrices is left."""

    def f(x, w):
        return lax.scan(lambda h, row: (h + row @ w, row @ WEIGHTS), jnp.zeros(6), x)

    _, delta = differencer(f, NORMAL, WEIGHTS)
    assert str(jax.make_jaxpr(lambda d: delta(None, d))(WEIGHTS)).count("dot_general") == 1


UNKNOWN = {
    "lgamma": lax.lgamma,
    "sort": lambda x: jnp.sort(x, 0) * 2,
    "while with a condition that changes": lambda x: lax.while_loop(
        lambda s: jnp.max(s) < 40, lambda s: 1.3 * s, x
    ),
    "cond with an index that changes": lambda x: lax.cond(x[0, 0] > 0.1, jnp.sin, jnp.cos, x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_no_rule_is_evaluated_twice_and_says_so(name):
    f = UNKNOWN[name]
    dx = 0.2 * draw(70, *POSITIVE.shape)
    with pytest.warns(DifferenceWarning, match=name):
        _, found = difference(f)(POSITIVE, dx)
    assert error(found[None], truth(f, [POSITIVE], [dx[None]])) < 1e-4
    with pytest.raises(NotImplementedError, match=name):
        difference(f, strict=True)(POSITIVE, dx)


def test_keys_may_be_arguments():
    """What follows from them alone has no need of rules, in loops too."""

    def f(x, key):
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        noise = lambda i: jax.random.normal(jax.random.fold_in(key, i))  # noqa: E731
        start = jnp.sum(x * kept, 0)
        return lax.scan(lambda s, i: (s + noise(i) * x[0], None), start, np.arange(2))[0]

    y, delta = jax.jit(functools.partial(differencer, f, strict=True))(NORMAL, jax.random.key(3))
    np.testing.assert_allclose(delta(1e-6 * NORMAL, None), 1e-6 * y, rtol=1e-5)


def test_only_what_the_result_needs_must_have_a_rule():
    def f(x):
        return jnp.sum(x * lax.lgamma(jnp.float32(2.5))), jnp.sum(lax.lgamma(x))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, delta, aux = differencer(f, POSITIVE, strict=True, has_aux=True)
    np.testing.assert_allclose(aux, f(POSITIVE)[1])
    assert delta(POSITIVE).shape == ()


# ------------------------------------------------------------------------------ as a transformation


def small(w1, b, w2):
    h = jax.nn.relu(conv(IMAGE, w1) + b[None, None, None])
    return jnp.mean(jnp.square(conv(pool(h, -jnp.inf, lax.max), w2)))


SMALL = KERNEL, draw(80, 4), 0.3 * draw(81, 3, 3, 4, 5)


def test_nothing_upstream_of_the_change_is_computed_again():
    _, delta = differencer(small, *SMALL)
    programs = [
        str(jax.make_jaxpr(lambda d, k=k: delta(*(d if i == k else None for i in range(3))))(w))
        for k, w in enumerate(SMALL)
    ]
    assert [p.count("conv_general_dilated[") for p in programs] == [2, 1, 1]
    assert ["reduce_window" in p or " max " in p for p in programs] == [True, True, False]


def test_both_phases_in_one_program_agree_on_what_was_kept():
    """A product that is fused with its maximum's subtraction is rounded otherwise, and not 0."""

    @jax.jit
    def move(gain, *index):
        # What is kept first is a constant, whose bits XLA knows.
        _, delta = differencer(lambda g: jnp.max(NORMAL * jnp.ones((4, 6)) * g, 1), gain)
        return delta(OneHot(index, 1e-6))

    gain = draw(82, 4, 6)
    largest = np.argmax(NORMAL * gain, 1)
    for i, j in np.ndindex(4, 6):
        np.testing.assert_array_equal(move(gain, i, j) != 0, (np.arange(4) == i) & (largest == j))
    assert "conditional" in move.lower(gain, 0, 0).compile().as_text()  # that keeps both apart


def test_delta_is_a_pytree_that_never_retraces_alone():
    traces = []

    @jax.jit
    def base(*w):
        traces.append("base")
        return differencer(small, *w)

    @jax.jit
    def scan(delta, index):
        traces.append("scan")
        one = lambda k, i: delta(OneHot((k, 0, 1, i), 1e-3), None, None)  # noqa: E731
        return lax.map(lambda i: jax.vmap(one, (0, None))(np.arange(3), i), index)

    y, delta = base(*SMALL)
    first = scan(delta, np.arange(4))
    _, other = base(*(w + 0.1 for w in SMALL))
    second = scan(other, np.arange(4))
    assert traces == ["base", "scan"]
    assert not np.allclose(first, second)
    np.testing.assert_allclose(y, small(*SMALL), rtol=1e-6)
    dw = np.zeros_like(SMALL[0])
    dw[2, 0, 1, 3] = 1e-3
    np.testing.assert_allclose(first[3, 2], delta(dw, None, None), rtol=1e-4)


def test_perturbations_side_by_side_share_the_weights():
    """No grouped convolution, no copy of a kernel for each perturbation."""
    _, delta = differencer(small, *SMALL)
    count = 7
    dense = jax.vmap(lambda d: delta(d, None, None))
    first = lambda i: delta(OneHot((0, 1, 2, i), 1e-3), None, None)  # noqa: E731
    fixed = lambda i: delta(OneHot((0, i, 2, 3), 1e-3), None, None)  # noqa: E731
    late = lambda i: delta(None, None, OneHot((0, 1, i, 3), 1e-3))  # noqa: E731
    bias = lambda i: delta(None, OneHot((i,), 1e-3), None)  # noqa: E731
    index = np.zeros(count, np.int32)
    texts = [jax.jit(dense).lower(np.zeros((count, *KERNEL.shape), np.float32)).as_text()]
    texts += [jax.jit(jax.vmap(g)).lower(index).as_text() for g in (first, fixed, late, bias)]
    kernels = ["x".join(map(str, w.shape)) for w in (SMALL[0], SMALL[2])]
    for text in texts:
        assert set(re.findall(r"feature_group_count = (\d+)", text)) <= {"1"}
        assert set(re.findall(r"batch_group_count = (\d+)", text)) <= {"1"}
    for text in texts[1:]:
        assert not any(f"{count}x{kernel}x" in text for kernel in kernels)
    assert f"{count}x{kernels[1]}x" not in texts[0]


def test_it_lowers_for_every_platform():
    def both(w, i):
        _, delta = differencer(small, *w)
        return delta(OneHot((0, 1, 2, i), 1e-3), None, None)

    exported = jax.export.export(jax.jit(both), platforms=("cpu", "cuda", "tpu"))(SMALL, 0)
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_a_change_of_one_weight_costs_one_slice_of_the_next_layer():
    channels = 16
    x = draw(90, 2, 8, 8, channels)
    w1, w2 = draw(91, 3, 3, channels, channels), draw(92, 3, 3, channels, channels)
    _, delta = differencer(lambda w1: jnp.sum(conv(jax.nn.relu(conv(x, w1)), w2)), w1)
    whole = jax.jit(delta).lower(w1).cost_analysis()["flops"]
    slab = jax.jit(lambda i: delta(OneHot((1, 1, i, i), 1e-3))).lower(0).cost_analysis()["flops"]
    print("flops", whole, slab)
    assert (
        slab < 1.5 * whole / 2 / channels
    )  # of two convolutions one in- and output by nine, one in


def test_single_changes_at_different_places_meet():
    def f(a, b):
        return jnp.tanh(NORMAL * a) * jnp.cos(NORMAL * b)

    a = b = np.ones((1, 6), np.float32)
    _, delta = differencer(f, a, b)
    steps = [scattered((1, 6), ([0], [i]), np.float32(0.1)) for i in (1, 4)]
    wanted = truth(f, (a, b), tuple(steps))
    assert error(delta(OneHot((0, 1), 0.1), OneHot((0, 4), 0.1))[None], wanted) < 3e-6


def test_it_works_inside_shard_map_and_with_collectives():
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    x, w = draw(93, 8, 6), WEIGHTS

    def local(w, x, dw):
        loss = lambda w: lax.pmean(jnp.mean(jnp.tanh(x @ w)), "rows")  # noqa: E731
        y, delta = differencer(loss, w, strict=True)
        return y, delta(dw), delta(OneHot((1, 2), 1e-3))

    fn = jax.shard_map(
        local, mesh=mesh, in_specs=(jax.P(), jax.P("rows"), jax.P()), out_specs=jax.P()
    )
    _, dense, one = jax.jit(fn)(w, x, 1e-6 * w)
    wanted = truth(
        lambda w: jnp.mean(jnp.tanh(wide(x) @ w)),
        [w],
        [np.stack([1e-6 * w, scattered(w.shape, ([1], [2]), np.float32(1e-3))[0]])],
    )
    assert error(np.stack([dense, one]), wanted) < 1e-5


def test_double_precision_programs_have_double_precision_differences():
    with jax.enable_x64(True):
        y, dy = difference(jnp.exp)(np.float64(1.0), np.float64(1e-12))
        assert dy.dtype == np.float64
        np.testing.assert_allclose(dy, y * np.expm1(1e-12), rtol=1e-14)


def test_bad_input_gets_a_clear_error():
    x = {"w": NORMAL, "n": np.arange(3)}
    f = lambda x: jnp.sum(x["w"]) + jnp.sum(x["n"])  # noqa: E731
    with pytest.raises(ValueError, match="primal_dtype"):
        differencer(f, x, primal_dtype=jnp.bfloat16)
    with pytest.raises(TypeError, match="pair"):
        differencer(f, x, has_aux=True)
    _, delta = differencer(f, x)
    for dx, kind, words in [
        ({"w": None, "n": np.ones(3)}, TypeError, "int32"),
        ({"w": NORMAL[:2], "n": None}, ValueError, "shapes of x"),
        ({"w": OneHot((1,), 0.1), "n": None}, ValueError, "each axis"),
        ({"w": OneHot((1, 6), 0.1), "n": None}, ValueError, "outside"),
        (NORMAL, ValueError, "subtree"),
    ]:
        with pytest.raises(kind, match=words):
            delta(dx)
    with pytest.raises(TypeError, match="arguments of f"):
        delta(None, None)
    assert delta(None) == 0
    assert delta({"w": NORMAL, "n": None}).dtype == np.float32


def test_the_page_on_differences_runs_as_it_stands(capsys):
    text = (pathlib.Path(__file__).parent.parent / "docs" / "difference.md").read_text()
    names = {"__name__": "difference"}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert "subtracted" in capsys.readouterr().out
