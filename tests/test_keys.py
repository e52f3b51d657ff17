"""Per-example keys: independent of the batch, distinct between streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrobust import keys


def data(k):
    return [tuple(row) for row in np.asarray(jax.random.key_data(k)).reshape(-1, 2).tolist()]


def test_examples_depend_on_their_id_only(key):
    ids = jnp.array([5, 0, 2**31 - 1, 7])
    together = keys.examples(key, ids)
    assert together.shape == (4,)
    for i, one in enumerate(ids):
        assert data(together[i]) == data(jax.random.fold_in(key, one))
        assert data(keys.examples(key, ids[i : i + 1])) == data(together[i])
    assert data(keys.examples(key, ids[::-1])) == data(together)[::-1]


def test_fold_takes_a_number_or_one_for_each(key):
    each = keys.examples(key, jnp.arange(3))
    np.testing.assert_array_equal(data(keys.fold(each, 4)), data(keys.fold(each, jnp.full(3, 4))))
    mixed = data(keys.fold(each, jnp.array([0, 1, 2])))
    for i in range(3):
        assert mixed[i] == data(keys.fold(each, i))[i]


def test_first_member_and_first_restart_draw_what_they_would_alone(key):
    each = keys.examples(key, jnp.arange(3))
    assert data(keys.attack(each, 0)) == data(each)
    again = keys.restart(each, jnp.array([0, 1, 2]))
    assert data(again)[0] == data(each)[0]
    assert data(again)[1] == data(keys.restart(each, jnp.full(3, 1)))[1]


def test_streams_do_not_meet(key):
    """Examples, members, restarts and steps, up to two levels deep: all keys distinct."""
    each = keys.examples(key, jnp.arange(4))
    members = [keys.attack(each, m) for m in range(4)]
    lanes = [keys.restart(m, jnp.full(4, r)) for m in members for r in range(4)]
    streams = [data(keys.fold(lane, t)) for lane in lanes for t in range(6)]
    streams += [data(lane) for lane in lanes]
    flat = [k for stream in streams for k in stream]
    assert len(flat) == len(set(flat)) == 4 * 16 * 7


def test_traceable(key):
    each = keys.examples(key, jnp.arange(3))
    index = jnp.array([0, 1, 2])
    assert data(jax.jit(keys.restart)(each, index)) == data(keys.restart(each, index))
    assert data(jax.jit(keys.examples)(key, index)) == data(each)


def test_check_accepts_one_typed_key_only(key):
    keys.check(key)
    with pytest.raises(TypeError, match=r"typed PRNG key.*jax\.random\.key"):
        keys.check(jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="typed PRNG key, got int"):
        keys.check(0)
    with pytest.raises(TypeError, match="rbg generator, whose draws depend on the batch"):
        keys.check(jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match=r"single key of shape \(\), got shape \(3,\)"):
        keys.check(jax.random.split(key, 3))


def test_algorithms_of_equal_fields_are_different_pytrees():
    """Else JAX may run the compiled program of one for the other."""
    from jrobust.threat import L1, L2, Linf

    trees = [jax.tree.structure(norm(0.1)) for norm in (Linf, L2, L1)]
    assert len({*trees}) == 3
    assert trees[0] != trees[1] != trees[2] != trees[0]
    assert jax.tree.structure(Linf(0.2)) == trees[0]
