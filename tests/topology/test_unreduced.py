"""Gradients that Explicit types say are unreduced, given to ``update`` as they are."""

import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

import efopt
from efopt import wire

EXPLICIT = meshes.Mesh(kind="explicit")
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SIGN = efopt.scaled_sign(8)


def feedback(axis="dcn", compressor=SIGN, exchange="two_phase"):
    return efopt.error_feedback(compressor, axis_name=axis, exchange=exchange)


def momentum(axis="dcn"):
    return efopt.per_worker(optax.trace(0.5), axis_name=axis)


CHAINS = {
    "feedback": feedback,
    "momentum": lambda axis: optax.chain(momentum(axis), feedback(axis)),
    "accumulate": lambda axis: efopt.accumulate(
        optax.chain(momentum(axis), feedback(axis)), every=2, axis_name=axis
    ),
    "guard": lambda axis: efopt.watch.skip_not_finite(feedback(axis), axis_name=axis),
    "own": lambda axis: optax.chain(
        efopt.convex.diana(efopt.random_k(k=1, unbiased=True), axis_name=axis),
        feedback(axis),
    ),
}
TWO_SLOW = meshes.Mesh((2, 2, 2), ("pod", "fsdp", "dcn"), ("pod", "dcn"), "explicit")
MESHES = [
    EXPLICIT,
    TWO_SLOW,
    meshes.Mesh((2, 2, 2), ("fsdp", "dcn", "tensor"), kind="explicit"),
    meshes.Mesh((8,), ("dcn",), kind="explicit"),
    meshes.Mesh((3, 2), kind="explicit"),
]
WHOLE = {"c_scale": ((32,), P()), "e_scalar": ((), P())}  # of a mesh without `fsdp`


def task_of(mesh, **options):
    shapes = meshes.EVEN if "fsdp" in mesh.names else WHOLE
    return meshes.task(mesh, steps=3, shapes=shapes, **options)


@pytest.mark.parametrize(
    "chain, mesh",
    [
        pytest.param(
            chain,
            mesh,
            id=f"{chain}-{mesh}",
            marks=[] if (chain, mesh) == ("momentum", EXPLICIT) else [pytest.mark.slow],
        )
        for chain in CHAINS
        for mesh in MESHES
    ],
)
def test_they_train_as_stacked_gradients_do(chain, mesh):
    """The same bits, where a number times that of the workers has its own again."""
    tx = optax.chain(CHAINS[chain](mesh.slow), optax.sgd(meshes.RATE))
    got, stacked = (
        meshes.run(entrance, tx, mesh, *task_of(mesh))
        for entrance in ("unreduced", "global")
    )
    close = 2e-6 if mesh.workers == 3 else 0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=close)
        assert x.sharding == y.sharding
    meshes.copies_equal(got)


@pytest.mark.slow
def test_in_the_dtype_of_the_parameters():
    tx = optax.chain(feedback(), optax.sgd(meshes.RATE))
    case = task_of(EXPLICIT, dtype=jnp.bfloat16)
    got, stacked = (
        meshes.run(entrance, tx, EXPLICIT, *case)
        for entrance in ("unreduced", "global")
    )
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(stacked), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def model(on, many, total):
    """A loss for reduced types, its parameter, a batch, and the same in NumPy."""
    draws = np.random.default_rng(1)
    w = draws.standard_normal((8, 4)).astype(np.float32)
    x = draws.standard_normal((many, 8)).astype(np.float32)
    add = jnp.sum if total else jnp.mean

    def loss(w, x):
        return add(jnp.einsum("bd,df->bf", x, w, out_sharding=P("dcn")) ** 2)

    def gradient(rows):
        scale = 1 if total else many * w.shape[1]
        return 2 * x[rows].T @ (x[rows] @ w) / scale

    place = NamedSharding(on, P()), NamedSharding(on, P("dcn"))
    return loss, jax.device_put(w, place[0]), jax.device_put(x, place[1]), gradient


@pytest.mark.parametrize("total", [False, True], ids=["mean", "sum"])
def test_what_is_averaged_is_the_gradient_and_each_owes_n_times_its_term(total):
    """Of a loss over the whole batch, be it a mean or a sum, against NumPy."""
    n, many = 4, 12
    on = jax.make_mesh((n,), ("dcn",))
    tx = efopt.error_feedback(efopt.sign(), axis_name="dcn")
    exact = efopt.compress(efopt.compressors.identity(), axis_name="dcn")
    with jax.set_mesh(on):
        loss, w, x, gradient = model(on, many, total)
        state = efopt.distribute((tx.init(w), exact.init(w)), on)

        @jax.jit
        def step(state, w, x):
            g = jax.grad(loss)(jax.reshard(w, P(reduced={"dcn"})), x)
            out, new = tx.update(g, state[0])
            return exact.update(g, state[1])[0], out, new.residual.value

        whole, signs, owed = map(np.asarray, step(state, w, x))
    terms = [gradient(slice(3 * i, 3 * i + 3)) for i in range(n)]
    np.testing.assert_allclose(whole, gradient(slice(None)), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(whole, sum(terms), rtol=1e-5, atol=1e-4)
    sent = [np.sign(n * t) for t in terms]
    np.testing.assert_array_equal(signs, np.mean(sent, axis=0))
    for row, t, s in zip(owed, terms, sent, strict=True):
        np.testing.assert_allclose(row, n * t - s, rtol=1e-5, atol=1e-3)


def test_nothing_but_the_payload_travels():
    tx = optax.chain(feedback(), optax.sgd(meshes.RATE))
    params, specs, grads = meshes.task(EXPLICIT, steps=1)

    def report(entrance):
        made = meshes.make(entrance, tx, EXPLICIT, params, specs, compiler_options=FAST)
        return wire.measure(made[0], made[1], made[2](grads[0]))

    plan = wire.plan(
        SIGN,
        params,
        mesh=EXPLICIT.make(),
        axis_name="dcn",
        params_specs=specs,
        exchange="two_phase",
        platform="cpu",
    )
    got, stacked = report("unreduced"), report("global")
    for axis in EXPLICIT.names:
        assert got.bytes_over(axis) == stacked.bytes_over(axis)
    assert got.bytes_over("dcn").link == plan.report.bytes_over("dcn").link > 0


# ------------------------------------------------------------------------- bad input


def refused(words, change=lambda g: g, reduced=("dcn",), axis="dcn", tx=None):
    """One traced step whose gradients, typed as unreduced, are changed before."""
    tx = tx or feedback(axis, exchange=None)
    on = EXPLICIT.make()
    with jax.set_mesh(on):
        params = {"b": jnp.ones(4), "w": jnp.ones((8, 2))}
        specs = {"b": P(), "w": P()}
        state = efopt.distribute({"p": params, "opt": tx.init(params)}, on, specs)
        x = jax.device_put(jnp.ones((8, 4)), NamedSharding(on, P(("dcn", "fsdp"))))

        def step(state, x):
            def loss(p):
                typed = jax.reshard(p["b"], P(None, reduced={*reduced, "fsdp"}))
                rows = jnp.broadcast_to(typed, x.shape)
                return jnp.mean(x * jax.reshard(rows, P(("dcn", "fsdp"))))

            p = {
                k: jax.reshard(v, P(*specs[k], reduced=set(reduced)))
                for k, v in state["p"].items()
            }
            return tx.update(change(jax.grad(loss)(p)), state["opt"])

        with pytest.raises(ValueError, match=words):
            jax.eval_shape(jax.jit(step), state, x)


def reduced_leaf(g):
    return g | {"b": jax.reshard(g["b"], P())}


TRANSFORMATIONS = {
    "feedback": None,
    "per_worker": momentum(),
    "accumulate": CHAINS["accumulate"]("dcn"),
    "guard": CHAINS["guard"]("dcn"),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_gradient_that_is_reduced_already(name):
    words = r"global updates of the type float32\[4\] at \['b'\].*value_and_grad.*ever"
    refused(words, reduced_leaf, tx=TRANSFORMATIONS[name])


def test_a_gradient_that_is_reduced_in_every_leaf():
    def averaged(g):
        return jax.tree.map(lambda x: jax.reshard(x, P()), g)

    refused(r"no worker's own.*`efopt.value_and_grad\(..., axis_name='dcn'", averaged)


def test_unreduced_over_other_axes():
    words = r"\['b'\].*unreduced over \['dcn', 'fsdp'\].*Sum over the others before"
    refused(words, reduced=("dcn", "fsdp"))
    refused(r"no worker's own: .*reduced=\{'fsdp'\}", axis="fsdp")


def test_of_a_single_worker():
    tx = efopt.error_feedback(SIGN)
    refused(r"`axis_name=None`.*unreduced over \['dcn'\].*axis_name='dcn'", tx=tx)


def typed(kind, spec, stacked=False):
    """An update traced with what has a type alone."""
    on, tx = meshes.Mesh(kind="explicit").make(), feedback(exchange=None)
    on = jax.sharding.Mesh(on.devices, on.axis_names, kind) if kind else on
    struct = jax.ShapeDtypeStruct
    state = jax.eval_shape(tx.init, struct((8, 2), jnp.float32))
    state = efopt.distribute(state, on, P("fsdp"))
    shape = (2, 8, 2) if stacked else (8, 2)
    x = struct(shape, jnp.float32, sharding=NamedSharding(on, spec))
    x = efopt.PerWorker(x, "dcn") if stacked else x
    return jax.eval_shape(jax.jit(tx.update), x, state)


def test_an_axis_that_is_left_to_the_compiler_behind_the_workers():
    kinds = AxisType.Explicit, AxisType.Auto
    with pytest.raises(ValueError, match=r"not all Explicit.*Make all of them"):
        typed(kinds, P(None, None, unreduced={"dcn"}))


def test_terms_that_lie_otherwise_than_the_state():
    words = r"sharded by P\('dcn', None, None\) at the root.* P\('dcn', 'fsdp'"
    with pytest.raises(ValueError, match=words):
        typed(None, P(None, None, unreduced={"dcn"}))


def test_rows_that_are_not_with_their_workers():
    with pytest.raises(ValueError, match=r"sharded by P\(None, 'fsdp', None\) at"):
        typed(None, P(None, "fsdp", None), stacked=True)


def test_terms_of_which_the_largest_is_meant():
    kinds = getattr(jax.sharding, "UnreducedKind", None)
    if kinds is None:
        pytest.skip("this JAX knows sums alone")
    spec = P("fsdp", None, unreduced={"dcn"}, unreduced_kind=kinds.max)
    with pytest.raises(ValueError, match=r"averages sums.*joined by .*max"):
        typed(None, spec)


def test_an_auto_mesh_knows_no_such_types():
    """JAX refuses it; what is averaged there is told as from anywhere else."""
    on = meshes.TWO_BY_FOUR.make()
    p = jax.device_put(jnp.ones((8, 2)), NamedSharding(on, P("fsdp")))
    with pytest.raises(ValueError, match="Explicit"):
        jax.reshard(p, NamedSharding(on, P("fsdp", None, reduced={"dcn"})))
    tx = feedback(exchange=None)
    with pytest.raises(ValueError, match=r"in a plain jitted step.*value_and_grad"):
        jax.eval_shape(tx.update, p, efopt.distribute(tx.init(p), on, P("fsdp")))
