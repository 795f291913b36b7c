"""Two levels for replicated parameters, against groups averaged and cut by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType
from workers_under_test import FAST, slow

import efopt
from efopt import wire
from efopt.codecs.layout import BUCKET_SIZE
from efopt.exchanges.pieces import Cut, gather

RATE, STEPS = 0.5, 4
SHAPES = {"a": (8, 6), "b": (6, 12), "c": (16,), "odd": (5,), "scalar": ()}


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A mesh of groups, the axes in any order, perhaps with a third behind all."""

    sizes: tuple[int, ...] = (2, 4)
    names: tuple[str, ...] = ("dcn", "fast")
    workers: tuple[str, ...] = ("dcn", "fast")
    kind: AxisType = AxisType.Auto

    def make(self):
        kinds = (self.kind,) * len(self.sizes)
        return jax.make_mesh(self.sizes, self.names, axis_types=kinds)

    def size(self, name):
        return dict(zip(self.names, self.sizes, strict=True)).get(name, 1)

    @property
    def n(self):
        return math.prod(map(self.size, self.workers))


PLAIN = Mesh()
SIGN = efopt.scaled_sign(8), "two_phase"


def transformation(compressor, inner, axis=("dcn", "fast"), **options):
    exchange = efopt.exchanges.hierarchical("fast", exchange=inner)
    return efopt.error_feedback(
        compressor, axis_name=axis, exchange=exchange, **options
    )


def task(mesh, dtype=np.float32):
    draws = np.random.default_rng(0)
    params = {k: draws.standard_normal(s).astype(dtype) for k, s in SHAPES.items()}
    grads = [
        {
            k: draws.standard_normal((mesh.n, *s)).astype(dtype)
            for k, s in SHAPES.items()
        }
        for _ in range(STEPS)
    ]
    return params, grads


def loss(params, batch):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
    return sum(jnp.sum(p * g[0]) for p, g in pairs)


def made(entrance, tx, mesh, params, specs=None):
    on, axis = mesh.make(), mesh.workers
    state = {"params": params, "opt": jax.jit(tx.init)(params)}
    state = efopt.distribute(state, on, specs)

    def apply(state, grads):
        updates, opt = tx.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}

    if entrance == "global":

        def step(state, batch):
            grad = efopt.value_and_grad(loss, axis_name=axis)
            return apply(state, grad(state["params"], batch)[1])

    else:
        placed = efopt.partition_specs(state, specs)
        step = jax.shard_map(
            lambda state, batch: apply(state, jax.tree.map(lambda g: g[0], batch)),
            mesh=on,
            in_specs=(placed, P(axis)),
            out_specs=placed,
        )
    place = lambda b: jax.device_put(b, jax.NamedSharding(on, P(axis)))  # noqa: E731
    return jax.jit(step, compiler_options=FAST), state, place


def run(entrance, tx, mesh):
    params, grads = task(mesh)
    step, state, place = made(entrance, tx, mesh, params)
    for g in grads:
        state = step(state, place(g))
    return state


def pieces(x, m, lead):
    """Along the first axis that m divides; whole where none does."""
    fitting = [d for d, size in enumerate(x.shape[lead:]) if size % m == 0]
    return np.split(x, m, axis=lead + fitting[0]) if fitting else None


def by_hand(compressor, exchange, mesh, **options):
    """Groups averaged, cut in m pieces, each a tree of its own over the groups.

    A leaf without such an axis is cut as a flat one is.
    """
    params, grads = task(mesh)
    m, groups = mesh.size("fast"), mesh.size("dcn")

    def means(g):  # workers in the order of `mesh.workers`
        order = [mesh.size(name) for name in mesh.workers]
        x = g.reshape(*order, *g.shape[1:])
        return x.mean(axis=mesh.workers.index("fast"), dtype=np.float64)

    def flat(x, lead):
        length = -(-math.prod(x.shape[lead:]) // m)
        rows = x.reshape(*x.shape[:lead], -1)
        return [rows[..., j * length : (j + 1) * length] for j in range(m)]

    def cut(x, lead):
        x = np.asarray(x, np.float32)
        return pieces(x, m, lead) or flat(x, lead)

    tx = optax.chain(
        efopt.error_feedback(compressor, axis_name="dcn", exchange=exchange, **options),
        optax.sgd(RATE),
    )

    @functools.partial(jax.vmap, axis_name="dcn")
    def step(state, g):
        updates, opt = tx.update(g, state[1], state[0])
        return optax.apply_updates(state[0], updates), opt

    step, ends = jax.jit(step), []
    start = jax.jit(lambda p: efopt.stack_workers((p, tx.init(p)), groups))
    for j in range(m):
        state = start({k: cut(x, 0)[j] for k, x in params.items()})
        for g in grads:
            state = step(state, {k: cut(means(x), 1)[j] for k, x in g.items()})
        ends.append(jax.tree.map(np.asarray, state[0]))
    whole = {}
    for k, x in params.items():
        parts = [end[k][0] for end in ends]
        fitting = [d for d, size in enumerate(x.shape) if size % m == 0]
        axis = fitting[0] if fitting else 0
        whole[k] = np.concatenate(parts, axis=axis).reshape(x.shape)
    return whole


CASES = {
    "exact": (efopt.compressors.identity(), None),
    "sign": SIGN,
    "top_k": (efopt.top_k(fraction=0.25, block_size=8), "all_gather"),
    "bits": (efopt.quantize(8, block_size=16), "two_phase"),
}
DEFAULT = {("sign", 3, "global")}
MESHES = [
    PLAIN,
    Mesh(kind=AxisType.Explicit),
    Mesh((4, 2)),
    Mesh((4, 2), ("fast", "dcn"), ("fast", "dcn")),
]


@pytest.mark.parametrize(
    "case, mesh, entrance",
    [
        slow(case, mesh, entrance, when=(case, i, entrance) not in DEFAULT)
        for case in CASES
        for i, mesh in enumerate(MESHES)
        for entrance in ("manual", "global")
    ],
)
def test_parameters_are_those_of_pieces_by_hand(case, mesh, entrance):
    compressor, inner = CASES[case]
    tx = optax.chain(transformation(compressor, inner, mesh.workers), optax.sgd(RATE))
    state, expected = run(entrance, tx, mesh), by_hand(compressor, inner, mesh)
    for name, x in expected.items():
        np.testing.assert_allclose(
            state["params"][name], x, rtol=0, atol=2e-6, err_msg=name
        )
    for x in jax.tree.leaves(state["params"]):
        assert len({np.asarray(s.data).tobytes() for s in x.addressable_shards}) == 1


UNDIVIDED = {"even": (8, 3), "odd": (5, 3), "tall": (9,)}
DRAWN_BY_DEFAULT = {("random_k", 1, "manual")}
DRAWN = {
    "random_block": lambda **k: efopt.random_block(seed=3, **k),
    "random_k": lambda **k: efopt.random_k(seed=3, **k),
    "random_block_unbiased": lambda **k: efopt.random_block(seed=3, unbiased=True, **k),
}


def hashed(*words):
    """Murmur3's finaliser after each word, in 64 bits and cut to 32."""
    low, h = np.uint64(0xFFFFFFFF), np.uint64(0x9E3779B9)
    for word in words:
        h = h ^ np.asarray(word).astype(np.uint64)
        h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & low
        h = ((h ^ (h >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & low
        h = ((h ^ (h >> np.uint64(16))) + np.uint64(0x9E3779B9)) & low
    return h


def drawn(name, key, k, size):
    """Which of ``size`` coordinates a key selects."""
    if name.startswith("random_block"):
        return (int(key) % size + np.arange(k)) % size
    ends = np.cumsum([0] + [size // k + (i < size % k) for i in range(k)])
    picks = [a + int(hashed(key, i)) % (b - a) for i, (a, b) in enumerate(pairs(ends))]
    rotated = int(hashed(np.uint64(0xFFFFFFFF) ^ key)) % size
    return (np.array(picks) + rotated) % size


def pairs(ends):
    return zip(ends[:-1], ends[1:], strict=True)


def in_numpy(name, mesh, params, grads, k=2):
    """Parameters, and what every group owes, both whole.

    What ``m`` does not divide is padded to ``m`` rows; every device of a group selects
    the same of its row, padding or not. A leaf is one block, numbered in their order.
    """
    m, groups = mesh.size("fast"), mesh.size("dcn")
    params = {n: x.astype(np.float64) for n, x in params.items()}
    owed = {n: np.zeros((groups, *x.shape)) for n, x in params.items()}
    for t, g in enumerate(grads):
        for index, (n, x) in enumerate(params.items()):
            fits = [d for d, size in enumerate(x.shape) if size % m == 0]
            rows = (lambda y, a=fits[0]: in_rows(y, a, m)) if fits else flat_rows(m)
            mean = g[n].astype(np.float64).reshape(groups, m, *x.shape).mean(axis=1)
            p = np.stack([rows(y) for y in mean + owed[n]])
            size = p.shape[-1]
            places = drawn(name, hashed(3, t, index), k, size)
            sent = np.zeros_like(p)
            sent[..., places] = p[..., places]
            if name.endswith("unbiased"):
                sent *= size / k
            back = out_of_rows(x.shape, fits[0] if fits else None, m)
            owed[n] = np.stack([back(y) for y in p - sent])
            params[n] = x - RATE * back(sent.mean(axis=0))
    return params, owed


def in_rows(y, axis, m):
    return np.stack([part.reshape(-1) for part in np.split(y, m, axis)])


def flat_rows(m):
    def rows(y):
        length = -(-y.size // m)
        return np.pad(y.reshape(-1), (0, m * length - y.size)).reshape(m, length)

    return rows


def out_of_rows(shape, axis, m):
    def whole(rows):
        if axis is None:
            return rows.reshape(-1)[: math.prod(shape)].reshape(shape)
        piece = [s // m if d == axis else s for d, s in enumerate(shape)]
        return np.concatenate([row.reshape(piece) for row in rows], axis)

    return whole


@pytest.mark.parametrize(
    "name, mesh, entrance",
    [
        slow(name, mesh, entrance, when=(name, i, entrance) not in DRAWN_BY_DEFAULT)
        for name in DRAWN
        for i, mesh in enumerate([PLAIN, Mesh((2, 3)), Mesh((3, 2))])
        for entrance in ("manual", "global")
    ],
)
def test_what_m_does_not_divide_is_drawn_as_in_numpy(name, mesh, entrance):
    draws = np.random.default_rng(1)
    params = {n: draws.standard_normal(s).astype("f") for n, s in UNDIVIDED.items()}
    grads = [
        {
            n: draws.standard_normal((mesh.n, *x.shape)).astype("f")
            for n, x in params.items()
        }
        for _ in range(STEPS)
    ]
    tx = optax.chain(transformation(DRAWN[name](k=2), None), optax.sgd(RATE))
    step, state, place = made(entrance, tx, mesh, params)
    for g in grads:
        state = step(state, place(g))
    whole, owed = in_numpy(name, mesh, params, grads)
    for n in params:
        got = state["params"][n], state["opt"][0].residual.value[n]
        for x, expected in zip(got, (whole[n], owed[n]), strict=True):
            np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5, err_msg=n)


@functools.cache
def ran():
    tx = optax.chain(transformation(*SIGN), optax.sgd(RATE))
    return run("global", tx, PLAIN)


def test_nothing_is_lost_and_a_device_keeps_its_part_alone():
    params, grads = task(PLAIN)
    state = ran()
    residual = state["opt"][0].residual.value
    link = state["opt"][0].link.home
    for name, x in params.items():
        assert residual[name].shape == (2, *x.shape)
        held = residual[name].addressable_shards[0].data.size
        assert held == x.size // (1 if name in ("odd", "scalar") else 4), name
    assert [c.kept for c in link.cuts()] == [True, True, True, False, False]
    # What owners owe is laid out by shard: told apart by sums alone.
    owed = sum(float(np.sum(x)) for x in jax.tree.leaves(state["opt"][0].link.server))
    came = sum(float(g[k].mean(0).sum()) for g in grads for k in params)
    applied = sum(
        float((x - np.asarray(state["params"][k])).sum()) for k, x in params.items()
    )
    residuals = sum(float(np.asarray(x).mean(0).sum()) for x in residual.values())
    np.testing.assert_allclose(applied / RATE + residuals + owed, came, atol=1e-3)


@pytest.mark.parametrize("mapped", [False, slow(True)])
def test_the_iterate_behind_is_read_from_pieces(mapped):
    params, grads = task(PLAIN)
    state = ran()

    def virtual(state):
        return efopt.virtual_params(state["params"], state["opt"], learning_rate=RATE)

    if mapped:
        specs = efopt.partition_specs(state)
        virtual = jax.shard_map(
            virtual, mesh=PLAIN.make(), in_specs=(specs,), out_specs=P()
        )
    for name, x in jax.jit(virtual)(state).items():
        sgd = params[name] - RATE * sum(g[name].mean(0) for g in grads)
        np.testing.assert_allclose(x, sgd, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("case", ["sign", slow("top_k"), slow("bits")])
def test_bytes_are_those_of_the_plan_and_a_fourth_of_a_device_s_own(case):
    compressor, inner = CASES[case]
    shapes = {k: SHAPES[k] for k in "abc"}
    exchange = efopt.exchanges.hierarchical("fast", exchange=inner)
    plan = wire.plan(
        compressor,
        {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()},
        exchange=exchange,
        mesh={"dcn": 2, "fast": 4},
        axis_name=("dcn", "fast"),
        platform="cpu",
    )
    params, grads = task(PLAIN)
    tx = optax.chain(transformation(compressor, inner), optax.sgd(RATE))
    only = lambda tree: {k: tree[k] for k in "abc"}  # noqa: E731
    step, state, place = made("manual", tx, PLAIN, only(params))
    report = wire.measure(step, state, place(only(grads[0])))
    for axis in ("dcn", "fast"):
        expected = plan.report.bytes_over(axis).link
        assert report.bytes_over(axis).link == expected > 0, report
    exact = 4 * sum(math.prod(s) for s in shapes.values())
    # Each of four devices: a part of the reduce-scatter, and of the gather.
    assert report.bytes_over("fast").link == 2 * 3 / 4 * exact


SCHEMES = {
    "start": lambda: transformation(*SIGN, start=2),
    "memory": lambda: transformation(
        SIGN[0], "all_gather", memory=efopt.quantize(8, block_size=8)
    ),
    "momentum": lambda: optax.chain(
        efopt.per_worker(optax.trace(0.5), axis_name=("dcn", "fast")),
        transformation(*SIGN),
    ),
    "accumulate": lambda: efopt.accumulate(
        transformation(*SIGN), every=2, axis_name=("dcn", "fast")
    ),
    "compress": lambda: efopt.compress(
        SIGN[0],
        axis_name=("dcn", "fast"),
        exchange=efopt.exchanges.hierarchical("fast"),
    ),
    "damped": lambda: efopt.feedback.damped_error_feedback(
        SIGN[0],
        alpha=0.5,
        beta=0.9,
        axis_name=("dcn", "fast"),
        exchange=efopt.exchanges.hierarchical("fast", exchange="two_phase"),
    ),
    "power_sgd": lambda: transformation(efopt.power_sgd(1, min_compression=1), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_entrances_train_alike(scheme):
    got = [
        run(entrance, optax.chain(SCHEMES[scheme](), optax.sgd(RATE)), PLAIN)["params"]
        for entrance in ("manual", "global")
    ]
    for name in SHAPES:
        np.testing.assert_allclose(got[0][name], got[1][name], rtol=0, atol=1e-6)
    assert all(np.isfinite(x).all() for x in got[0].values())


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "axis, fast",
    [("fast", "fast"), (("dcn", "pod"), "fast"), (("fast", "pod"), ("fast", "pod"))],
)
def test_fast_axes_are_some_of_the_workers_axes(axis, fast):
    with pytest.raises(ValueError, match=r"needs the fast axes among"):
        efopt.compress(
            efopt.scaled_sign(),
            axis_name=axis,
            exchange=efopt.exchanges.hierarchical(fast),
        )


def test_what_is_no_level():
    with pytest.raises(
        ValueError, match=r"hierarchical\(exchange=...\).* must be one of"
    ):
        efopt.exchanges.hierarchical("fast", exchange="nothing")
    with pytest.raises(ValueError, match="of one level"):
        efopt.exchanges.hierarchical(
            "fast", exchange=efopt.exchanges.hierarchical("other")
        )
    with pytest.raises(TypeError, match=r"hierarchical\(fast=...\)"):
        efopt.exchanges.hierarchical(3)
    with pytest.raises(ValueError, match=r"hierarchical.*cannot work.*block_size"):
        transformation(efopt.scaled_sign(), "two_phase")


def test_a_state_that_is_not_placed_or_cannot_be():
    tx, params = transformation(*SIGN), task(PLAIN)[0]
    state = efopt.stack_workers(jax.tree.map(np.asarray, tx.init(params)), (2, 4))
    step = jax.vmap(jax.vmap(tx.update, axis_name="fast"), axis_name="dcn")
    grads = {k: np.zeros((2, 4, *s), np.float32) for k, s in SHAPES.items()}
    with pytest.raises(ValueError, match=r"by parts.*place it with.*have no mesh"):
        jax.eval_shape(step, grads, state)
    with pytest.raises(ValueError, match=r"has no such axis"):
        efopt.distribute(tx.init(params), jax.make_mesh((2, 4), ("dcn", "other")))
    specs = {**{k: P() for k in SHAPES}, "a": P("fast")}
    with pytest.raises(ValueError, match=r"leave the axis out of `axis_name`"):
        efopt.distribute(tx.init(params), PLAIN.make(), specs)


def test_what_is_each_worker_s_own_still_cannot_be_averaged_before():
    with pytest.raises(ValueError, match=r"Give it the inner exchange"):
        efopt.convex.diana(
            efopt.random_k(k=1, unbiased=True),
            axis_name=("dcn", "fast"),
            exchange=efopt.exchanges.hierarchical("fast"),
        )


def test_large_leaves_are_gathered_each_by_itself():
    """What is joined is copied, and waits for all: small ones alone are."""
    big = BUCKET_SIZE // 4 + 1
    rows = (8, 16, big, big)
    cuts = [Cut((2 * n, 4), ("fast",), 2, axis=0) for n in rows]
    pieces = [jax.ShapeDtypeStruct((n, 4), jnp.float32) for n in rows]
    traced = jax.make_jaxpr(lambda *xs: gather(cuts, xs), axis_env=[("fast", 2)])
    names = [eqn.primitive.name for eqn in traced(*pieces).eqns]
    assert sum("all_gather" in name for name in names) == 3, names
    assert names.count("concatenate") == 1, names
