"""Every scheme and published optimizer from every entrance, against shards by hand."""

import dataclasses
import functools

import jax
import meshes
import numpy as np
import optax
import pytest

import efopt

MESH = meshes.TWO_BY_FOUR
AXIS = "dcn"
SIGN = efopt.scaled_sign(8)
ROUND = efopt.quantize(4, stochastic=True, block_size=16)
RATES = optax.exponential_decay(0.5, 2, 0.5)
# What is stored compressed is stored by shard: no leaf here is cut in pieces.
STORED = {
    "a_rows": ((64, 32), jax.P("fsdp", None)),
    "b_columns": ((32, 64), jax.P(None, "fsdp")),
}


def chained(*parts):
    return optax.chain(*parts, optax.sgd(meshes.RATE))


def feedback(**options):
    return efopt.error_feedback(
        SIGN, axis_name=AXIS, **{"exchange": "two_phase", **options}
    )


SCHEMES = {
    "compress": lambda: chained(efopt.compress(SIGN, axis_name=AXIS)),
    "compress_two_phase": lambda: chained(
        efopt.compress(SIGN, axis_name=AXIS, exchange="two_phase")
    ),
    "schedule": lambda: optax.chain(
        feedback(learning_rate=RATES), optax.scale_by_learning_rate(RATES)
    ),
    "start": lambda: chained(feedback(start=2)),
    "delay": lambda: chained(feedback(delay=1)),
    "delay_vote": lambda: chained(
        efopt.error_feedback(
            efopt.sign(), axis_name=AXIS, exchange="majority_vote", delay=1
        )
    ),
    "delay_memory": lambda: chained(
        feedback(memory=efopt.quantize(8, stochastic=True), exchange=None, delay=1)
    ),
    "memory": lambda: chained(
        feedback(memory=efopt.quantize(8, stochastic=True), exchange=None)
    ),
    "memory_two_phase": lambda: chained(
        feedback(memory=efopt.quantize(8, stochastic=True), start=1)
    ),
    "damped": lambda: chained(
        efopt.feedback.damped_error_feedback(
            SIGN, alpha=0.5, beta=0.9, axis_name=AXIS, exchange="two_phase"
        )
    ),
    "ef21": lambda: chained(
        efopt.feedback.ef21(
            SIGN, beta=0.9, start=1, axis_name=AXIS, exchange="two_phase"
        )
    ),
    "econtrol": lambda: optax.chain(
        efopt.feedback.econtrol(SIGN, gain=0.5, learning_rate=RATES, axis_name=AXIS),
        optax.scale_by_learning_rate(RATES),
    ),
    "econtrol_memory": lambda: chained(
        efopt.feedback.econtrol(
            SIGN,
            gain=0.5,
            memory=efopt.quantize(8, stochastic=True),
            start=1,
            axis_name=AXIS,
        )
    ),
    "loco_memory": lambda: chained(
        efopt.feedback.loco(
            SIGN,
            reset=2,
            memory=efopt.quantize(8, stochastic=True),
            axis_name=AXIS,
        )
    ),
    "demo": lambda: efopt.optimizers.demo(
        0.1, decay=0.9, k=2, tile=4, weight_decay=0.01, axis_name=AXIS
    ),
    "arc_top_k": lambda: chained(
        efopt.feedback.ef21(efopt.compressors.arc_top_k(k=1, rank=1), axis_name=AXIS)
    ),
    "momentum": lambda: chained(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS), feedback()
    ),
    "accumulate": lambda: efopt.accumulate(
        chained(feedback()), every=2, axis_name=AXIS
    ),
    "accumulate_momentum": lambda: efopt.accumulate(
        chained(efopt.per_worker(optax.trace(0.9), axis_name=AXIS), feedback()),
        every=2,
        axis_name=AXIS,
    ),
    "local_steps": lambda: efopt.local_steps(
        optax.adamw(0.1), chained(feedback()), every=2, axis_name=AXIS
    ),
    "local_steps_streamed": lambda: efopt.local_steps(
        optax.adamw(0.1),
        chained(feedback()),
        every=3,
        fragments=2,
        delay=2,
        alpha=0.5,
        axis_name=AXIS,
    ),
    "dist_ef_sgd": lambda: efopt.dist_ef_sgd(
        RATES, compressor=SIGN, weight_decay=0.01, axis_name=AXIS
    ),
    "ef_sgd": lambda: efopt.ef_sgd(
        SIGN, 0.1, momentum=0.9, weight_decay=0.01, axis_name=AXIS
    ),
    "ef_sgd_server": lambda: efopt.ef_sgd(
        SIGN, 0.1, momentum=0.9, momentum_at="server", axis_name=AXIS
    ),
    "ef_signsgd": lambda: efopt.ef_signsgd(0.1, axis_name=AXIS),
    "signsgd": lambda: efopt.signsgd(0.1, weight_decay=0.01, axis_name=AXIS),
    "signum": lambda: efopt.optimizers.signum(0.1, axis_name=AXIS),
    "power_sgd_momentum": lambda: efopt.power_sgd_momentum(0.1, rank=1, axis_name=AXIS),
    "ecq_sgd": lambda: efopt.optimizers.ecq_sgd(
        0.1, compressor=ROUND, alpha=0.5, beta=0.9, axis_name=AXIS
    ),
    "distributed_lion": lambda: efopt.optimizers.distributed_lion(
        0.1, weight_decay=0.01, axis_name=AXIS
    ),
    "lion_cub": lambda: efopt.optimizers.distributed_lion(
        0.1, compressor=SIGN, average_momentum=2, axis_name=AXIS
    ),
    "one_bit_adam": lambda: efopt.optimizers.one_bit_adam(
        0.1, warmup=2, compressor=SIGN, weight_decay=0.01, axis_name=AXIS
    ),
    "zero_one_adam": lambda: efopt.optimizers.zero_one_adam(
        RATES, freeze=4, refresh=1, compressor=SIGN, axis_name=AXIS
    ),
    "zero_one_adam_local": lambda: efopt.optimizers.zero_one_adam(
        RATES, freeze=1, longest=2, doubling=1, compressor=SIGN, axis_name=AXIS
    ),
    "senders": lambda: chained(
        efopt.error_feedback(
            CODECS["senders"],
            axis_name=AXIS,
            exchange=efopt.exchanges.all_gather(senders=True),
        )
    ),
    "diana": lambda: chained(
        efopt.convex.diana(ROUND, alpha=0.1, axis_name=AXIS), feedback()
    ),
}
CODECS = {
    "arc_top_k": efopt.compressors.arc_top_k(k=1, rank=1),
    "demo": efopt.compressors.dct_top_k(k=2, tile=4),
    "senders": efopt.top_k(k=2, block_size=16),
}
# One of each way to keep state: none, stored compressed, an estimate from a dense
# start, gathered over mini-steps with momentum in front, and what workers and owners
# owe after a schedule. Most through the entrance that is farthest from the flat case;
# workers that meet seldom have tests/topology/test_local_steps_on_meshes.py.
DEFAULT = {
    (scheme, "global") for scheme in "signsgd memory ef21 accumulate_momentum".split()
} | {("dist_ef_sgd", "nested")}


NIGHTLY = {("ef_sgd", "global"), ("start", "global")}


def marks(case):
    if case in DEFAULT:
        return []
    return [meshes.NIGHTLY if case in NIGHTLY else pytest.mark.slow]


def given(scheme):
    shapes = STORED if "memory" in scheme else meshes.EVEN
    return meshes.task(MESH, steps=4, shapes=shapes)


@functools.cache
def by_hand(scheme):
    params, specs, grads = given(scheme)
    if "power" in scheme:
        return meshes.whole(SCHEMES[scheme](), MESH, params, grads)
    codec = CODECS.get(scheme, SIGN)
    cuts = meshes.parts(MESH, params, specs, codec)
    return meshes.flat(SCHEMES[scheme](), MESH, params, grads, cuts)[0]


@pytest.mark.parametrize(
    "scheme, entrance",
    [
        pytest.param(s, e, marks=marks((s, e)))
        for s in SCHEMES
        for e in meshes.ENTRANCES
    ],
)
def test_every_scheme_trains_as_its_shards_by_hand(scheme, entrance):
    params, specs, grads = given(scheme)
    state = meshes.run(entrance, SCHEMES[scheme](), MESH, params, specs, grads)
    meshes.close(state["params"], by_hand(scheme))
    meshes.copies_equal(state)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["momentum", "accumulate_momentum"])
def test_what_stands_in_front_bears_an_explicit_mesh(scheme):
    """Kinds of axes change no number."""
    params, specs, grads = given(scheme)
    explicit = dataclasses.replace(MESH, kind="explicit")
    state = meshes.run("global", SCHEMES[scheme](), explicit, params, specs, grads)
    meshes.close(state["params"], by_hand(scheme))


def test_a_stored_residual_is_small_on_every_device():
    """Payloads of shards, laid out with them: a quarter of the leaf and some scales."""
    params, specs, grads = given("memory")
    tx = SCHEMES["memory"]()
    state = meshes.run("global", tx, MESH, params, specs, grads[:1])
    held = [
        x.addressable_shards[0].data.nbytes
        for x in jax.tree.leaves(state["opt"][0].residual)
    ]
    whole = sum(x.nbytes for x in params.values())
    assert sum(held) < 1.1 * whole / 4 / 4
    assert np.all([np.isfinite(x).all() for x in jax.tree.leaves(state["params"])])
