"""What every scheme and optimizer promises, over two tables of `registry.py`.

First what Optax asks of a transformation, then what efopt promises of workers, then
what bad input gets. Most of it is seen at trace time; programs are compiled once a row.

Each worker has a quadratic of its own: curvatures from 0.1 to 1 and its own optimum.
"""

import functools
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from registry import AXIS, OPTIMIZERS, SCHEMES, SHAPES, WORKERS, Scheme
from workers_under_test import FAST, make_mesh, slow

import efopt

ROWS = (*SCHEMES, *OPTIMIZERS)
STEPS = 3


def each(rows, by_default=lambda row: True):
    """One case a row; `pytest -m slow` takes variants, and those that are named.

    Both at once, a variant in a long test, are left to `pytest -m exhaustive`.
    """

    def case(row):
        long = not by_default(row)
        return slow(row, when=row.slow or long, rare=row.slow and long, id=row.name)

    return pytest.mark.parametrize("row", [case(row) for row in rows])


each_row = each(ROWS)
each_alone = each([r for r in ROWS if r.alone])
each_optimizer = each(OPTIMIZERS)
over_workers = [r for r in ROWS if r.over_workers]
each_over_workers = each(over_workers)
each_that_averages = each([r for r in over_workers if r.averages])
each_with_own_state = each([r for r in over_workers if r.own])


def schedule(t):
    return 0.1 / (1.0 + 0.1 * t)


def tree(seed, *lead, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal((*lead, *s), np.float32) for k, s in shapes.items()}


PARAMS = tree(0)
OPTIMA = tree(1, WORKERS)  # of the workers, which all have one of their own


def one(i=0):
    return jax.tree.map(lambda x: x[i], OPTIMA)


def make(row, axis_name=None, **changes):
    """With a schedule for a rate: every step has another."""
    if row in OPTIMIZERS and row.rate is not None:
        changes = {"learning_rate": schedule, **changes}
    return row.make(axis_name, **changes)


def curvature(p):
    return np.linspace(0.1, 1, p.size, dtype=np.float32).reshape(p.shape)


def arguments(row, optimum, **extra):
    """The gradient as a function, and what `update` takes beside it."""

    def loss(params):
        bowl = lambda p, o: jnp.sum(curvature(p) * (p - o) ** 2) / 2  # noqa: E731
        return sum(jax.tree.leaves(jax.tree.map(bowl, params, optimum)))

    grad_fn = jax.grad(loss)

    if row.functions:
        extra = {**extra, "grad_fn": grad_fn, "full_grad_fn": grad_fn}
    return grad_fn, extra


def alone(params, state):
    return efopt.local_params(params, None, state)


def step_of(row, tx, local=alone):
    """One step on ``(params, state)`` with this worker's optimum."""

    def step(carry, optimum):
        params, state = carry
        # For somebody else in the chain; to be ignored.
        grad_fn, extra = arguments(row, optimum, value=1.0)
        updates, state = tx.update(
            grad_fn(local(params, state)), state, params, **extra
        )
        return (optax.apply_updates(params, updates), state), updates

    return step


def here(params, state):
    return efopt.local_params(params, AXIS, state)


def types(values):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), values)


def is_own(x):
    return isinstance(x, efopt.PerWorker)


# ------------------------------------------------------- what Optax asks of it


# Those that call the gradient keep a copy of the parameters' values.
@each([r for r in ROWS if not r.functions])
def test_init_takes_shapes_for_arrays(row):
    tx = make(row, None if row.alone else AXIS)
    structs = jax.eval_shape(lambda: PARAMS)
    from_arrays = jax.eval_shape(lambda: tx.init(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        from_arrays, jax.eval_shape(lambda: tx.init(structs))
    )
    assert jax.tree.leaves(from_arrays) or not (row.own or row.owes)


@each_alone
def test_state_and_updates_keep_their_types_through_branches(row):
    """In bfloat16 and float32, as one branch of a `cond`, with arguments for others."""
    params = {"b": jnp.asarray(PARAMS["b"], jnp.bfloat16), "w": PARAMS["w"]}
    tx = make(row)

    def maybe(params, state):
        step = functools.partial(step_of(row, tx), optimum=one())
        skip = lambda c: (c, jax.tree.map(jnp.zeros_like, params))  # noqa: E731
        return jax.lax.cond(True, step, skip, (params, state))

    state = jax.eval_shape(tx.init, params)
    (_, after), updates = jax.eval_shape(maybe, params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@each_alone
def test_map_params_knows_what_is_shaped_like_parameters(row):
    tx = make(row)
    state = jax.eval_shape(tx.init, PARAMS)
    marked = optax.tree.map_params(
        tx,
        lambda x: "params",
        state,
        transform_non_params=lambda x: "other",
    )

    def agrees(mark, below):  # what is laid out by a rule of its own has one mark
        for x in jax.tree.leaves(below):
            if x.shape in SHAPES.values():
                assert mark == "params"
            elif x.shape == ():
                assert mark == "other"

    jax.tree.map(agrees, marked, state)


def start(tx):
    """The first state, as NumPy, without one eager operation."""
    return jax.tree.map(np.asarray, jax.jit(tx.init)(PARAMS))


@functools.cache
def trained(row):
    """Transformation, its program, and `(params, state, updates)` of some steps."""
    chex.clear_trace_counter()
    tx, out = make(row), []
    step = chex.assert_max_traces(step_of(row, tx), n=1)  # nothing is compiled anew
    fn, carry = jax.jit(step, compiler_options=FAST), (PARAMS, start(tx))
    for t in range(STEPS):
        carry, updates = fn(carry, one(t))
        out.append(jax.tree.map(np.asarray, (*carry, updates)))
    return tx, fn, out


@each_alone
def test_a_step_changes_the_parameters_and_stays_finite(row):
    *_, out = trained(row)
    for params, state, updates in out:
        chex.assert_tree_all_finite((params, state, updates))
    if row in OPTIMIZERS:
        moved = [updates for *_, updates in out[: row.moves]]
        assert any((u != 0).any() for u in jax.tree.leaves(moved))


@each(
    [r for r in ROWS if r.alone and "learning_rate" in r.parameters],
    lambda row: row.name in ("ef_sgd", "signsgd"),
)
def test_an_injected_learning_rate_changes_nothing_and_is_found(row):
    injected = optax.inject_hyperparams(row.factory, static_args=row.static_args)
    tx = injected(**{**row.options(None), "learning_rate": schedule})
    plain = row.make(learning_rate=schedule)
    state = start(tx)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.1, rtol=1e-6)
    carry, expected = (PARAMS, state), (PARAMS, start(plain))
    fn, want = (jax.jit(step_of(row, t), compiler_options=FAST) for t in (tx, plain))
    for t in range(STEPS):
        carry, updates = fn(carry, one(t))
        expected, wanted = want(expected, one(t))
        chex.assert_trees_all_close(updates, wanted, rtol=1e-6, atol=1e-6)


@each_alone
def test_a_state_that_was_stored_goes_on_as_if_nothing_had_happened(row):
    tx, fn, out = trained(row)
    params, state, _ = out[-2]
    data = flax.serialization.to_bytes(state)
    fresh = jax.tree.map(np.zeros_like, state)
    restored = flax.serialization.from_bytes(fresh, data)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert pickle.loads(pickle.dumps(jax.tree.structure(state))) == jax.tree.structure(
        state
    )
    carry, updates = fn((params, restored), one(STEPS - 1))
    chex.assert_trees_all_equal((*carry, updates), out[-1])


# Without jit each operation is a program of its own: one whole chain by default.
@each([r for r in ROWS if r.alone], lambda row: row.name == "signsgd")
def test_jit_changes_nothing(row):
    """To the bit where sums are short or exact, else to the last bits of a sum."""
    tx, fn, out = trained(row)
    carry = PARAMS, start(tx)
    for t in range(2):
        carry, updates = step_of(row, tx)(carry, one(t))
        if row.exact:
            chex.assert_trees_all_close((*carry, updates), out[t], rtol=1e-6, atol=1e-6)
        else:
            chex.assert_trees_all_close((*carry, updates), out[t], rtol=0, atol=1e-5)


SMALL = {"b": (5,), "w": (3, 4)}


@each_optimizer
def test_it_converges_on_a_quadratic(row):
    """From far away to a thousandth, in float32, at a rate that ends at zero."""
    start = jax.tree.map(lambda p: p * 3, tree(2, shapes=SMALL))
    optimum = jax.tree.map(np.ones_like, start)
    changes = {}
    if row.rate is not None:
        changes["learning_rate"] = optax.cosine_decay_schedule(row.rate, row.steps)
    if "reference_grads" in row.parameters:
        changes["reference_grads"] = jax.tree.map(np.zeros_like, start)
    tx = row.make(**changes)

    @functools.partial(jax.jit, compiler_options=FAST)
    def minimise(params):
        step = step_of(row, tx)
        body = lambda c, _: (step(c, optimum)[0], None)  # noqa: E731
        carry = params, tx.init(params)
        return jax.lax.scan(body, carry, length=row.steps)[0][0]

    chex.assert_trees_all_close(minimise(start), optimum, rtol=0, atol=1e-3)


# ----------------------------------------------- what efopt promises of workers


@functools.cache
def placed(row, how="auto", **changes):
    """Transformation, mesh, and `(params, state)` described as placed on it."""
    tx, mesh = make(row, AXIS, **changes), make_mesh(how, WORKERS)
    described = jax.eval_shape(lambda: (PARAMS, tx.init(PARAMS)))
    return tx, mesh, efopt.distribute(described, mesh)


def on_mesh(row, tx, mesh, carry, local=here, specs=None):
    """The step under ``shard_map``, with its default checks.

    Of ``(params, state)`` where updates come out equal on all workers. Else what it
    passes on is each worker's own, parameters would be as well, and it returns the
    state alone.
    """
    specs = efopt.partition_specs(carry) if specs is None else specs
    step = step_of(row, tx, local)

    def mine(carry, optimum):
        carry, updates = step(carry, jax.tree.map(lambda x: x[0], optimum))
        if row.averages:
            return carry, updates
        return carry[1], jax.tree.map(lambda u: u[None], updates)

    out = (specs, P()) if row.averages else (specs[1], P(AXIS))
    return jax.shard_map(mine, mesh=mesh, in_specs=(specs, P(AXIS)), out_specs=out)


@functools.cache
def taken(row):
    """What a step gives back of gradients at `local_params`, as shapes."""
    tx, mesh, carry = placed(row)
    return jax.eval_shape(on_mesh(row, tx, mesh, carry), carry, OPTIMA)


@each_over_workers
def test_what_is_each_workers_own_is_marked_and_the_rest_replicated(row):
    """And a step takes and gives back what it was given, by the types of shard_map."""
    tx, mesh, carry = placed(row)
    nodes = jax.tree.leaves(carry[1], is_leaf=is_own)
    assert any(map(is_own, nodes)) == row.own
    specs = efopt.partition_specs(carry)
    for node, spec in zip(
        nodes,
        jax.tree.leaves(specs[1], is_leaf=lambda x: is_own(x) or isinstance(x, P)),
        strict=True,
    ):
        for leaf in jax.tree.leaves(spec, is_leaf=lambda x: isinstance(x, P)):
            assert leaf == (P(AXIS) if is_own(node) else P())
    got = taken(row)
    state = got[0][1] if row.averages else got[0]
    assert types(state) == types(carry[1])


@each_row
def test_a_memory_report_leaves_nothing_out_and_knows_the_residual(row):
    tx = make(row, AXIS if row.over_workers else None)
    report = efopt.memory_report(tx, PARAMS)
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, PARAMS))
    assert report.per_worker_bytes + report.replicated_bytes == sum(
        x.size * x.dtype.itemsize for x in leaves
    )
    assert (report.per_worker_bytes > 0) == row.own
    assert (report.residual_bytes > 0) == row.owes
    assert str(report).count("\n") >= len(report.parts) + 3


@each(over_workers, by_default=lambda row: row.kind)
def test_a_state_made_inside_the_mapped_function_equals_a_placed_one(row):
    tx, mesh = make(row, AXIS), make_mesh("auto", WORKERS)
    state = efopt.distribute(start(tx), mesh)
    specs = efopt.partition_specs(state)
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=specs)
    made = jax.jit(init, compiler_options=FAST)(PARAMS)
    chex.assert_trees_all_equal(made, state)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def history(row, how, **changes):
    """Updates and the last state, `[step][worker]`, under one way of mapping."""
    tx = make(row, AXIS, **changes)
    whole = PARAMS, start(tx)
    out = []
    if how in ("pmap", "vmap"):
        step = step_of(row, tx, here)
        own = lambda carry, optimum: step(carry, optimum)  # noqa: E731
        carry = efopt.stack_workers(whole, WORKERS)
        if how == "pmap":
            fn = jax.pmap(own, axis_name=AXIS, devices=jax.devices()[:WORKERS])
        else:
            fn = jax.jit(jax.vmap(own, axis_name=AXIS))
        for t in range(STEPS):
            carry, updates = fn(carry, turned(t))
            if not row.averages:
                carry = efopt.stack_workers(PARAMS, WORKERS), carry[1]
            out.append(jax.tree.map(np.asarray, updates))
        return out, jax.tree.map(np.asarray, carry[1])
    mesh = make_mesh(how, WORKERS)
    carry = efopt.distribute(whole, mesh)
    fn = jax.jit(on_mesh(row, tx, mesh, carry))
    sharding = jax.NamedSharding(mesh, P(AXIS))
    for t in range(STEPS):
        got, updates = fn(carry, jax.device_put(turned(t), sharding))
        if row.averages:
            carry = got
            updates = jax.tree.map(each_copy, updates)
        else:
            carry = efopt.distribute(PARAMS, mesh), got
        out.append(jax.tree.map(np.asarray, updates))
    return out, jax.tree.map(np.asarray, carry[1])


def each_copy(x):
    """What every device holds of a replicated array."""
    return np.stack([np.asarray(s.data) for s in x.addressable_shards])


def turned(t):
    """The workers' optima, moved on by one each step: no two steps are alike."""
    return jax.tree.map(lambda x: np.roll(x, t, axis=0), OPTIMA)


def bits(values):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(values)]


def in_parts(row):
    """Whether it stands for those whose state owners split: mapped in every way."""
    return row.kind and row.options(AXIS).get("exchange") == "two_phase"


@each(over_workers, by_default=in_parts)
def test_workers_agree_and_differ_however_they_are_mapped(row):
    """Schemes to the bit between meshes and pmap; sums run in another order under vmap.

    What an optimizer adds to its exchange is fused differently by every program.
    """
    (reference, state), atol = history(row, "auto"), 1e-6 if row.exact else 3e-5
    for updates in reference:
        for u in jax.tree.leaves(updates):
            assert len({x.tobytes() for x in u}) == (1 if row.averages else WORKERS)
    for how in ("explicit", "pmap", "vmap"):
        updates, last = history(row, how)
        if how == "vmap" or row in OPTIMIZERS:
            chex.assert_trees_all_close(updates, reference, rtol=0, atol=atol)
            continue
        chex.assert_trees_all_equal(updates, reference)
        nodes = zip(
            jax.tree.leaves(last, is_leaf=is_own),
            jax.tree.leaves(state, is_leaf=is_own),
            strict=True,
        )
        for a, b in nodes:
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                if how == "pmap":  # stacked: every worker's copy of what is replicated
                    y = y if is_own(b) else np.stack([y] * WORKERS)
                    x, y = x.reshape(y.shape) if is_own(a) else x, y
                np.testing.assert_array_equal(x, y, err_msg=how)


@each(over_workers, by_default=in_parts)
def test_along_a_second_axis_every_device_has_the_same_updates(row):
    """Each sends a piece there, which is compressed as a leaf of its own.

    Where nothing is lost, the pieces are the leaf: to the bit that of a flat axis, but
    for the arithmetic that an optimizer, or an inexact scheme, adds.
    """
    names = {"compressor", "shift_compressor"} & row.parameters
    lossless = efopt.compressors.identity()
    if "exchange" not in row.parameters:  # which may be one that asks for blocks
        lossless = efopt.top_k(fraction=1.0, block_size=16)
    changes = dict.fromkeys(names, lossless)
    if row.options(AXIS).get("exchange") == "two_phase":
        changes["exchange"] = None
    for given in ({}, changes) if changes else ({},):
        updates, _ = history(row, "two_d", **given)
        for u in jax.tree.leaves(updates):
            assert len({x.tobytes() for x in u}) == (1 if row.averages else WORKERS)
    if changes:
        reference, _ = history(row, "auto", **changes)
        one = lambda tree: jax.tree.map(lambda u: u[:WORKERS], tree)  # noqa: E731
        if row in OPTIMIZERS or not row.exact:
            chex.assert_trees_all_close(one(updates), reference, rtol=0, atol=1e-6)
        else:
            chex.assert_trees_all_equal(one(updates), reference)


# What is in flight there only the next step can read: tests/exchanges has its law.
@each(
    [
        r
        for r in over_workers
        if r.factory is efopt.error_feedback and "delay" not in r.options(AXIS)
    ]
)
def test_along_a_second_axis_nothing_is_lost(row):
    """All that came in is what was applied and what workers and owners still owe."""
    tx, mesh = make(row, AXIS), make_mesh("two_d", WORKERS)
    carry = efopt.distribute((PARAMS, start(tx)), mesh)
    fn = jax.jit(on_mesh(row, tx, mesh, carry), compiler_options=FAST)
    for t in range(STEPS):
        into = jax.tree.map(
            lambda p, o: (curvature(p) * (np.asarray(p) - o)).mean(0, np.float64),
            carry[0],
            turned(t),
        )
        before = owed(carry[1])
        carry, updates = fn(carry, turned(t))
        after = owed(carry[1])
        for name in SHAPES:
            lost = into[name] + before[name] - np.asarray(updates[name]) - after[name]
            if not jax.tree.leaves(carry[1].link.server):
                np.testing.assert_allclose(lost, 0, rtol=0, atol=1e-5)
                continue
            into[name] = lost.sum()
        if jax.tree.leaves(carry[1].link.server):  # in blocks of all leaves
            lost = sum(into.values()) + before["server"] - after["server"]
            np.testing.assert_allclose(lost, 0, rtol=0, atol=1e-4)


def owed(state):
    """By leaf what workers owe in the mean; and all that owners do."""
    residual, server = jax.tree.map(
        lambda x: np.asarray(x, np.float64),
        (state.residual.value, jax.tree.leaves(state.link.server)),
    )
    total = {name: x.mean(axis=0) for name, x in residual.items()}
    return {**total, "server": sum(x.sum() for x in server)}


# ------------------------------------------------------------------- bad input


@each_over_workers
@pytest.mark.parametrize("where", ["eager", "jit"])
def test_update_outside_the_mapped_function_is_refused(row, where):
    tx = make(row, AXIS)
    shapes = jax.eval_shape(tx.init, PARAMS)
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    _, extra = arguments(row, one())
    update = functools.partial(tx.update, **extra)
    call = update if where == "eager" else jax.jit(update)
    with pytest.raises(ValueError, match="'data'.*none of that name is bound") as seen:
        call(PARAMS, state, PARAMS)
    assert "`jax.shard_map`" in str(seen.value)
    assert f"`jax.vmap(..., axis_name={AXIS!r})`" in str(seen.value)


@each_that_averages
def test_gradients_already_summed_over_workers_are_refused_and_local_ones_not(row):
    tx, mesh, carry = placed(row)
    with pytest.raises(ValueError, match="already equal on all workers") as seen:
        jax.eval_shape(
            on_mesh(row, tx, mesh, carry, local=lambda p, s: p), carry, OPTIMA
        )
    assert f"`efopt.local_params(params, {AXIS!r})`" in str(seen.value)
    taken(row)  # with the cure that the message names


@each_with_own_state
@pytest.mark.parametrize("state", ["fresh", "whole"])
def test_state_passed_as_replicated_is_refused(row, state):
    tx, mesh, carry = placed(row)
    if state == "fresh":
        carry = jax.eval_shape(lambda: (PARAMS, tx.init(PARAMS)))
    # Mapped over, a node would put the worker axis in front of every `P()`.
    step = on_mesh(row, tx, mesh, carry, specs=(P(), P()))
    with pytest.raises(ValueError, match="not laid out over the workers") as seen:
        jax.eval_shape(step, carry, OPTIMA)
    for cure in ("distribute(state, mesh)", "partition_specs(state)"):
        assert f"`efopt.{cure}`" in str(seen.value)


@each_with_own_state
def test_state_of_all_workers_given_to_each_under_vmap_is_refused(row):
    tx, _, carry = placed(row)
    step = jax.vmap(step_of(row, tx, here), in_axes=(None, 0), axis_name=AXIS)
    with pytest.raises(ValueError, match="not laid out over the workers"):
        jax.eval_shape(step, carry, OPTIMA)


@each([r for r in ROWS if "compressor" in r.parameters])
@pytest.mark.parametrize("given", [optax.identity(), efopt.sign], ids=["optax", "call"])
def test_what_is_no_compressor_is_refused(row, given):
    with pytest.raises(TypeError, match="`efopt.Compressor`"):
        make(row, compressor=given)


@each([r for r in ROWS if "exchange" in r.parameters])
def test_an_exchange_that_does_not_exist_is_refused(row):
    with pytest.raises(ValueError, match=r"exchange=.*got 'ring'"):
        make(row, AXIS, exchange="ring")


@each([r for r in over_workers if "axis_name" in r.parameters])
def test_an_axis_name_that_is_none_is_refused(row):
    with pytest.raises(TypeError, match=r"axis_name=\.\.\.\)` must be .*got 0"):
        row.factory(**{**make_options(row), "axis_name": 0})


def make_options(row: Scheme):
    rate = {"learning_rate": 0.1} if row in OPTIMIZERS and row.rate else {}
    return {**row.options(AXIS), **rate}


@each([r for r in ROWS if r.functions])
@pytest.mark.parametrize("missing", ["params", "grad_fn", "full_grad_fn"])
def test_missing_function_is_named_with_the_call(row, missing):
    tx = make(row)
    grad_fn, given = arguments(row, one())
    given = {"params": PARAMS, **given}
    del given[missing]
    params = given.pop("params", None)
    with pytest.raises(ValueError, match="needs ") as seen:
        tx.update(PARAMS, jax.eval_shape(tx.init, PARAMS), params, **given)
    what = "the parameters" if missing == "params" else f"`{missing}`"
    call = "tx.update(grads, state, params, grad_fn=grad_fn, full_grad_fn=full_grad_fn)"
    assert f"needs {what}" in str(seen.value) and call in str(seen.value)


@each([r for r in ROWS if "mask" in r.parameters])
def test_weight_decay_mask_of_another_structure_is_refused(row):
    tx = make(row, weight_decay=0.01, mask={"w": True, "other": False})
    with pytest.raises(ValueError, match="(?i)mismatch|structure"):
        jax.eval_shape(tx.init, PARAMS)
        jax.eval_shape(step_of(row, tx), (PARAMS, tx.init(PARAMS)), one())
