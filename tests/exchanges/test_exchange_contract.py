"""What every exchange promises, over the table of `registry.py`.

Two programs a row: one step of `compress`, and some of `error_feedback`, over eight
workers, each with gradients of its own.
"""

import functools

import chex
import jax
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from registry import EXCHANGES
from workers_under_test import FAST

import efopt

N, SIZE = 8, 150
each_row = pytest.mark.parametrize("row", EXCHANGES, ids=lambda row: row.name)
GRADS = np.random.default_rng(0).standard_normal((4, N, SIZE)).astype(np.float32)


def mesh(row):
    names = row.axis_name if isinstance(row.axis_name, tuple) else (row.axis_name,)
    sizes = {1: (N,), 2: (row.groups, N // (row.groups or 1))}[len(names)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names))


@functools.cache
def program(row, factory):
    """The compiled step on one leaf, and its first state, placed."""
    tx = factory(row.compressor, axis_name=row.axis_name, exchange=row.make())
    like = np.zeros(SIZE, np.float32)
    state = efopt.distribute(
        jax.tree.map(np.asarray, jax.jit(tx.init)(like)), mesh(row)
    )
    specs = efopt.partition_specs(state)
    step = jax.shard_map(
        lambda g, s: tx.update(g[0], s),
        mesh=mesh(row),
        in_specs=(P(row.axis_name), specs),
        out_specs=(P(), specs),
    )
    return jax.jit(step, compiler_options=FAST).lower(GRADS[0], state).compile(), state


def place(row, grads):
    return jax.device_put(grads, jax.NamedSharding(mesh(row), P(row.axis_name)))


def groups(row, grads):
    """What is encoded: of each worker, or the mean of each group."""
    if row.groups is None:
        return list(grads.astype(np.float64))
    return list(grads.reshape(row.groups, -1, SIZE).mean(axis=1, dtype=np.float64))


@each_row
def test_the_average_is_its_oracle_and_the_same_on_every_worker(row):
    step, state = program(row, efopt.compress)
    out, _ = step(place(row, GRADS[0]), state)
    first, *others = (np.asarray(s.data) for s in out.addressable_shards)
    assert len(others) == N - 1
    for other in others:
        assert other.tobytes() == first.tobytes()
    messages = [[x] for x in groups(row, GRADS[0])]
    if row.votes:
        (want,), _ = oracle.majority_vote_step(messages)
    else:
        (want,) = oracle.compress_step(messages, row.says)
    if row.keeps:  # said once more on the way back
        want = row.says(want)
    if row.votes:  # a tie is a coin, which `test_ties.py` tosses
        tied = np.sum([np.where(x >= 0, 1, -1) for (x,) in messages], axis=0) == 0
        assert 0 < tied.sum() < tied.size / 2 and (np.abs(first) == 1).all()
        want = np.where(tied, first, want)
    np.testing.assert_allclose(first, want, rtol=0, atol=1e-6)


@each_row
def test_nothing_is_lost_between_workers(row):
    """mean(updates + old owed) = applied + mean(new owed), with the owners' part."""
    step, state = program(row, efopt.error_feedback)
    for grads in GRADS:
        before = owed(state)
        out, state = step(place(row, grads), state)
        put_in = grads.mean(axis=0, dtype=np.float64) + before
        found = np.asarray(out, np.float64) + owed(state)
        np.testing.assert_allclose(found, put_in, rtol=0, atol=1e-5)
    # Each worker, or each group of them, owes something else.
    residuals = np.asarray(state.residual.value).reshape(-1, SIZE)
    different = {x.tobytes() for x in residuals}
    assert len(different) == (row.groups or N) or row.compressor.codec.exact


def owed(state):
    total = np.asarray(state.residual.value, np.float64)
    total = total.reshape(-1, SIZE).mean(axis=0)
    for server in jax.tree.leaves(state.link.server):
        total = total + np.asarray(server, np.float64).reshape(-1)[:SIZE]
    return total


@each_row
def test_a_step_has_the_collectives_of_its_exchange_and_carries_words(row):
    step, _ = program(row, efopt.compress)
    report = efopt.wire.measure(step)
    assert tuple(sorted(c.operation for c in report.collectives)) == row.operations
    outside = [c for c in report.collectives if c.group_size == (row.groups or N)]
    assert outside and {t for c in outside for t in c.element_types} == {row.carrier}
    payload = row.compressor.payload_bits((SIZE,)) / 8
    for c in outside:
        assert c.operand_bytes <= payload + 4 * N * (row.compressor.block_size or 1)


@each_row
def test_it_is_a_value_and_its_state_is_the_owners_alone(row):
    exchange = row.make()
    assert isinstance(exchange, efopt.exchanges.Exchange)
    assert exchange == row.make() and hash(exchange) == hash(row.make())
    assert exchange.name == row.name and exchange.keeps == row.keeps
    _, state = program(row, efopt.error_feedback)
    assert bool(state.link.server) == row.keeps


@pytest.mark.parametrize(
    "row", [r for r in EXCHANGES if r.alias], ids=lambda row: row.name
)
def test_its_name_will_do(row):
    """The same program, by the same route."""
    like = np.zeros(SIZE, np.float32)

    def step(exchange):
        tx = efopt.error_feedback(
            row.compressor, axis_name=row.axis_name, exchange=exchange
        )
        state = efopt.stack_workers(jax.tree.map(np.asarray, tx.init(like)), N)
        return str(
            jax.make_jaxpr(jax.vmap(tx.update, axis_name="data"))(GRADS[0], state)
        )

    assert step(row.name) == step(row.make())


def test_two_levels_over_one_group_a_worker_are_the_exchange_itself():
    """A fast axis of length one averages nothing."""
    (row,) = [r for r in EXCHANGES if r.name == "two_level"]
    tx = efopt.compress(row.compressor, axis_name=row.axis_name, exchange=row.make())
    plain = efopt.compress(
        row.compressor, axis_name=row.axis_name, exchange=row.carries
    )
    like = np.zeros(SIZE, np.float32)

    def update(tx):
        step = lambda g: tx.update(g, tx.init(like))[0]  # noqa: E731
        both = jax.vmap(jax.vmap(step, axis_name="fast"), axis_name="slow")
        return jax.jit(both, compiler_options=FAST)(GRADS[0][:, None])

    chex.assert_trees_all_equal(update(tx), update(plain))
