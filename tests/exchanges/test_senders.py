"""The mean over those who have sent a number, not over all."""

import jax
import numpy as np
import optax
import pytest
from methods_under_test import compiled
from scipy import fft
from workers_under_test import AXIS, FAST, make_mesh, slow

import efopt
from efopt import wire

SENDERS = efopt.exchanges.all_gather(senders=True)
RNG = np.random.default_rng(3)


def largest(x, k):
    """The ``k`` largest of an array, and where they stand."""
    marks = np.zeros(x.size, bool)
    marks[np.argsort(-np.abs(x.reshape(-1)), kind="stable")[:k]] = True
    return np.where(marks.reshape(x.shape), x, 0), marks.reshape(x.shape)


def of_senders(xs, k):
    """2508.15706's and 2411.19870's released codes: a sum over a count."""
    pairs = [largest(x, k) for x in xs]
    count = sum(marks.astype(float) for _, marks in pairs)
    return sum(x for x, _ in pairs) / np.maximum(count, 1)


def averaged(compressor, updates, exchange=SENDERS, how="auto"):
    """What ``compress`` makes of every worker's update, on all of them."""
    n = len(updates)
    tx = efopt.compress(compressor, axis_name=AXIS, exchange=exchange)
    if how == "vmap":
        state = efopt.stack_workers(tx.init(updates[0]), n)
        return np.asarray(
            jax.jit(jax.vmap(tx.update, axis_name=AXIS))(updates, state)[0]
        )
    mesh = make_mesh(how, n)
    state = efopt.distribute(jax.jit(tx.init)(updates[0]), mesh)
    specs = efopt.partition_specs(state)
    fn = jax.shard_map(
        lambda x, s: tx.update(x[0], s)[0],
        mesh=mesh,
        in_specs=(jax.P(AXIS), specs),
        out_specs=jax.P(),
    )
    xs = jax.device_put(updates, jax.NamedSharding(mesh, jax.P(AXIS)))
    out = jax.jit(fn, compiler_options=FAST)(xs, state)
    return np.stack([np.asarray(s.data) for s in out.addressable_shards])


@pytest.mark.parametrize(
    "how, n", [("auto", 3), slow("explicit", 3), slow("auto", 2), ("vmap", 5)]
)
def test_a_coordinate_is_averaged_over_those_who_sent_it(how, n):
    xs = RNG.standard_normal((n, 4, 9)).astype(np.float32)
    got = averaged(efopt.top_k(k=7), xs, how=how)
    assert len({x.tobytes() for x in got}) == 1
    np.testing.assert_allclose(got[0], of_senders(xs, 7), rtol=1e-6, atol=1e-7)
    every = averaged(efopt.top_k(k=7), xs, "all_gather", how)
    assert np.abs(got[0]).sum() > 1.2 * np.abs(every[0]).sum()


def test_cosine_coefficients_are_averaged_before_they_are_turned_back():
    xs = RNG.standard_normal((4, 8, 8)).astype(np.float32)
    got = averaged(efopt.compressors.dct_top_k(k=9, tile=8), xs, how="vmap")[0]
    spectra = [fft.dctn(x.astype(np.float64), norm="ortho") for x in xs]
    want = fft.idctn(of_senders(spectra, 9), norm="ortho")
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_two_bit_zero_has_been_sent_and_a_place_left_over_has_not():
    """Of values in two bits, to the nearest, the smaller ones are zeros."""
    two_bits = efopt.compose(efopt.top_k(k=2), efopt.quantize(2, stochastic=False))
    xs = np.zeros((2, 32), np.float32)
    xs[0, [3, 5]], xs[1, [5, 7]] = (4.0, 1.0), (4.0, 3.0)
    got = averaged(two_bits, xs, how="vmap")[0]
    np.testing.assert_allclose(got[[3, 5, 7]], [4, 2, 4])
    reached = efopt.compressors.threshold(2.0, k=2)
    got = averaged(reached, xs, how="vmap")[0]
    np.testing.assert_allclose(got[[3, 5, 7]], [4, 4, 3])


def test_where_all_choose_alike_it_is_the_mean():
    xs = np.broadcast_to(RNG.standard_normal((6, 6)), (4, 6, 6)).astype(np.float32)
    xs = xs * np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1)
    compressor = efopt.top_k(k=5, block_size=16)
    pair = [averaged(compressor, xs, e, "vmap")[0] for e in (SENDERS, "all_gather")]
    np.testing.assert_allclose(*pair, rtol=1e-6)


@pytest.mark.parametrize("n", [2, slow(8)])
def test_the_count_costs_no_bytes(n):
    layers, sent = {"w": np.zeros((64, 64), np.float32)}, []
    for exchange in (SENDERS, None):
        tx = efopt.outer.sparse_loco(
            optax.sgd(0.1), axis_name=AXIS, every=2, exchange=exchange
        )
        sent.append(wire.measure(*compiled(tx, layers, n)).operand_bytes)
    assert sent[0] == sent[1] > 0


@pytest.mark.parametrize(
    "compressor",
    [efopt.scaled_sign(), efopt.compressors.arc_top_k(fraction=0.1)],
    ids=["signs", "rounds"],
)
def test_what_speaks_of_every_coordinate_is_refused(compressor):
    with pytest.raises(ValueError, match="does not tell which coordinates"):
        efopt.error_feedback(compressor, axis_name=AXIS, exchange=SENDERS)


def test_a_switch_is_a_bool():
    with pytest.raises(TypeError, match="senders.*Python bool"):
        efopt.exchanges.all_gather(senders=1)
