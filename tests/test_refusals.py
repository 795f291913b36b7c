"""What bad input gets: an error that names the option, the rule, what came, the cure.

Only the library's own words are asserted. Everything is refused when a transformation
is made or traced, so that no test here compiles a step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import efopt

AXIS = "data"
PARAMS = {"b": np.ones(5, np.float32), "w": np.ones((3, 4), np.float32)}
GRADS = jax.tree.map(lambda p: np.ones((8, *p.shape), np.float32), PARAMS)


def feedback(*args, **kwargs):
    return efopt.error_feedback(*args, **kwargs)


def conef(memory=None, **kwargs):
    memory = efopt.quantize(8) if memory is None else memory
    return efopt.contractive_error_feedback(
        efopt.scaled_sign(), memory=memory, **kwargs
    )


def over_workers(compressor=None, **kwargs):
    compressor = efopt.scaled_sign() if compressor is None else compressor
    return efopt.error_feedback(compressor, axis_name=AXIS, **kwargs)


def refused(kind, words, call, *args, **kwargs):
    """Calls, and checks that the error is ours and says all of the words."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    assert caught.type is kind
    for word in words:
        assert word in str(caught.value)


def trace(mesh, fn, *args, in_specs, out_specs=P()):
    """Traces ``fn`` under ``shard_map`` with its default checks; compiles nothing."""
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.eval_shape(mapped, *args)


def own(grads):
    """This worker's gradients, of its slice of an array with a leading worker axis."""
    return jax.tree.map(lambda g: g[0], grads)


RANGE = "must lie in (0, 1]"
STATIC = "must be a Python int, because it fixes shapes or the program"
OPTIONS = {
    "start-negative": (
        lambda: feedback(efopt.sign(), start=-3),
        ValueError,
        ["`error_feedback(start=...)`", "must be at least 0", "got -3"],
    ),
    "start-float": (
        lambda: efopt.compress(efopt.sign(), start=1.5),
        TypeError,
        ["`compress(start=...)`", "Python int", "got float"],
    ),
    "ef21-beta": (
        lambda: efopt.feedback.ef21(efopt.sign(), beta=1.0),
        ValueError,
        ["`ef21(beta=...)`", "in [0, 1)", "got 1.0"],
    ),
    "ef21-beta-traced": (
        lambda: efopt.feedback.ef21(efopt.sign(), beta=jnp.float32(0.9)),
        TypeError,
        ["`ef21(beta=...)`", "Python number", "static_args=('beta',)"],
    ),
    "ef21-start": (
        lambda: efopt.feedback.ef21(efopt.sign(), start=-1),
        ValueError,
        ["`ef21(start=...)`", "must be at least 0", "got -1"],
    ),
    "econtrol-gain-zero": (
        lambda: efopt.feedback.econtrol(efopt.sign(), gain=0),
        ValueError,
        ["`econtrol(gain=...)`", "in (0, 1]", "got 0", "`efopt.feedback.ef21`"],
    ),
    "econtrol-gain-above-one": (
        lambda: efopt.feedback.econtrol(efopt.sign(), gain=1.1),
        ValueError,
        ["`econtrol(gain=...)`", "in (0, 1]", "got 1.1"],
    ),
    "econtrol-estimate": (
        lambda: efopt.feedback.econtrol(efopt.sign(), estimate=0),
        TypeError,
        ["`econtrol(estimate=...)`", "Python bool"],
    ),
    "econtrol-start": (
        lambda: efopt.feedback.econtrol(efopt.sign(), start=0.5),
        TypeError,
        ["`econtrol(start=...)`", "Python int"],
    ),
    "loco-beta": (
        lambda: efopt.feedback.loco(beta=1.0),
        ValueError,
        ["`loco(beta=...)`", "in [0, 1)", "got 1.0"],
    ),
    "loco-reset": (
        lambda: efopt.feedback.loco(reset=0),
        ValueError,
        ["`loco(reset=...)`", "must be at least 1", "got 0"],
    ),
    "loco-memory": (
        lambda: efopt.feedback.loco(memory=efopt.power_sgd(1)),
        ValueError,
        ["`loco(memory=power_sgd", "one message a step"],
    ),
    "demo-decay": (
        lambda: efopt.optimizers.demo(0.1, decay=1.0),
        ValueError,
        ["`demo(decay=...)`", "in [0, 1)", "got 1.0"],
    ),
    "arc-both-sizes": (
        lambda: efopt.compressors.arc_top_k(k=1, fraction=0.1),
        ValueError,
        ["`arc_top_k` takes exactly one of `fraction` and `k`"],
    ),
    "arc-rank": (
        lambda: efopt.compressors.arc_top_k(k=1, rank=0),
        ValueError,
        ["`arc_top_k(rank=...)`", "must be at least 1", "got 0"],
    ),
    "arc-two-phase": (
        lambda: over_workers(efopt.compressors.arc_top_k(k=1), exchange="two_phase"),
        ValueError,
        ["arc_top_k(k=1", "two_phase", "cannot work"],
    ),
    "dct-tile": (
        lambda: efopt.compressors.dct_top_k(k=1, tile=0),
        ValueError,
        ["`dct_top_k(tile=...)`", "must be at least 1", "got 0"],
    ),
    "memory-no-compressor": (
        lambda: conef(optax.trace(0.9)),
        TypeError,
        ["`contractive_error_feedback(memory=...)`", "`efopt.Compressor`"],
    ),
    "memory-rebuilt-sketch": (
        lambda: conef(efopt.compressors.count_sketch(fraction=0.2), form="rewrite"),
        ValueError,
        ["memory=count_sketch", "its own noise", "multiplied", 'form="increment"'],
    ),
    "memory-not-linear": (
        lambda: conef(efopt.quantize(8), form="increment"),
        ValueError,
        ["not linear", 'form="rewrite"'],
    ),
    "memory-form": (
        lambda: conef(form="sideways"),
        ValueError,
        ["`contractive_error_feedback(form=...)`", "'increment'", "got 'sideways'"],
    ),
    "memory-four-bits-to-the-nearest": (
        lambda: conef(efopt.quantize(4, stochastic=False)),
        ValueError,
        ["rounded to the nearest", "4 bits", "`stochastic=True`"],
    ),
    "memory-in-a-partition": (
        lambda: conef(
            efopt.compressors.partition(
                {
                    "a": efopt.compressors.identity(),
                    "b": efopt.quantize(2, stochastic=False),
                },
                "a",
            )
        ),
        ValueError,
        ["rounded to the nearest", "2 bits"],
    ),
    "memory-of-signs": (
        lambda: conef(efopt.sign()),
        ValueError,
        ["memory=sign()", "forgets all magnitudes"],
    ),
    "memory-with-rounds": (
        lambda: conef(efopt.power_sgd(1)),
        ValueError,
        ["memory=power_sgd", "one message a step"],
    ),
    "damping-above-one": (
        lambda: conef(damping=1.5),
        ValueError,
        ["`contractive_error_feedback(damping=...)`", "in [0, 1]", "got 1.5"],
    ),
    "damping-negative": (
        lambda: conef(damping=-0.1),
        ValueError,
        ["`contractive_error_feedback(damping=...)`", "got -0.1"],
    ),
    "damping-nan": (
        lambda: conef(damping=float("nan")),
        ValueError,
        ["`contractive_error_feedback(damping=...)`", "got nan"],
    ),
    "damping-traced": (
        lambda: conef(damping=jnp.float32(0.9)),
        TypeError,
        ["Python number", "static_args=('damping',)"],
    ),
    "memory-dtype": (
        lambda: conef(residual_dtype="int8"),
        TypeError,
        [
            "`contractive_error_feedback(residual_dtype=...)`",
            "floating-point",
            "'int8'",
        ],
    ),
    "sketch-without-a-bucket": (
        lambda: efopt.compressors.count_sketch(width=0),
        ValueError,
        ["`count_sketch(width=...)`", "at least 1", "got 0"],
    ),
    "sketch-of-nothing": (
        lambda: efopt.compressors.count_sketch(fraction=0.0),
        ValueError,
        ["`count_sketch(fraction=...)`", "(0, 1]"],
    ),
    "sketch-hash": (
        lambda: efopt.compressors.count_sketch(width=2, hash="murmur"),
        ValueError,
        ["`count_sketch(hash=...)`", "'structured', 'random'", "'murmur'"],
    ),
    "bits-one": (
        lambda: efopt.quantize(1),
        ValueError,
        ["`quantize(bits=...)`", "must be at least 2", "got 1"],
    ),
    "bits-nine": (
        lambda: efopt.quantize(9),
        ValueError,
        ["`quantize(bits=...)`", "must be below 9", "got 9"],
    ),
    "scale": (
        lambda: efopt.quantize(8, scale="l1"),
        ValueError,
        ["`quantize(scale=...)`", "'absmax', 'l2'", "got 'l1'"],
    ),
    "stochastic": (
        lambda: efopt.quantize(8, stochastic=1),
        TypeError,
        ["`quantize(stochastic=...)`", "Python bool", "got int"],
    ),
    "levels": (
        lambda: efopt.compressors.qsgd(levels=128),
        ValueError,
        ["`qsgd(levels=...)`", "must be below 128"],
    ),
    "cast-dtype": (
        lambda: efopt.compressors.cast(jnp.float32),
        ValueError,
        ["`cast(dtype=...)`", "'bfloat16'", "got 'float32'"],
    ),
    "cast-no-dtype": (
        lambda: efopt.compressors.cast("float7"),
        TypeError,
        ["`cast(dtype)`", "'float7'"],
    ),
    "rank-zero": (
        lambda: efopt.power_sgd(0),
        ValueError,
        ["`power_sgd(rank=...)`", "at least 1"],
    ),
    "rank-above-the-matrix": (
        lambda: efopt.power_sgd(4, min_compression=0).init({"w": jnp.zeros((3, 9))}),
        ValueError,
        ["`power_sgd(rank=...)`", "rank=4 for 3 x 9", "`min_compression`"],
    ),
    "split-zero": (
        lambda: efopt.power_sgd(1, split=0),
        ValueError,
        ["`power_sgd(split=...)`", "must not be 0"],
    ),
    "min-compression": (
        lambda: efopt.power_sgd(1, min_compression=-1),
        ValueError,
        ["`power_sgd(min_compression=...)`", "at least 0"],
    ),
    "threshold-negative": (
        lambda: efopt.compressors.threshold(-1.0, k=1),
        ValueError,
        ["`threshold(threshold=...)`", "at least 0", "got -1.0"],
    ),
    "threshold-vector": (
        lambda: efopt.compressors.threshold(jnp.ones(3), k=1),
        TypeError,
        ["`threshold(threshold=...)`", "a schedule or a scalar array"],
    ),
    "width-and-fraction": (
        lambda: efopt.compressors.count_sketch(width=3, fraction=0.5),
        ValueError,
        ["`count_sketch`", "exactly one of `fraction` and `width`"],
    ),
    "compose-over-sign": (
        lambda: efopt.compose(efopt.sign(), efopt.quantize(4)),
        TypeError,
        ["`compose(sign(), ...)`", "no values to compress again"],
    ),
    "compose-of-rounds": (
        lambda: efopt.compose(efopt.top_k(k=3), efopt.power_sgd(1)),
        TypeError,
        ["makes no sense", "one message a step"],
    ),
    "compose-of-composed": (
        lambda: efopt.compose(
            efopt.compose(efopt.top_k(k=3), efopt.quantize(4)), efopt.quantize(8)
        ),
        ValueError,
        ["values are compressed already"],
    ),
    "compose-of-no-compressor": (
        lambda: efopt.compose(efopt.top_k(k=3), optax.identity()),
        TypeError,
        ["`compose(inner)`", "efopt.Compressor"],
    ),
    "partition-empty": (
        lambda: efopt.compressors.partition({}, {}),
        ValueError,
        ["`partition(compressors)`", "at least one"],
    ),
    "partition-of-no-compressor": (
        lambda: efopt.compressors.partition({"a": optax.identity()}, {}),
        TypeError,
        ["`partition(compressors)`", "efopt.Compressor", "'a'"],
    ),
    "partition-unknown-label": (
        lambda: efopt.compressors.partition({"a": efopt.sign()}, {"w": "b"}).update(
            {"w": jnp.ones(3)}, efopt.sign().init({"w": jnp.ones(3)})
        ),
        ValueError,
        ["no compressor for the label 'b'", "['w']"],
    ),
    "partition-other-structure": (
        lambda: efopt.compressors.partition({"a": efopt.sign()}, {"v": "a"}).update(
            {"w": jnp.ones(3)}, efopt.sign().init({"w": jnp.ones(3)})
        ),
        ValueError,
        ["the labels have another structure"],
    ),
    "partition-refused": (
        lambda: efopt.error_feedback(
            efopt.compressors.partition({"a": efopt.top_k(k=1)}, {}),
            axis_name=AXIS,
            exchange="majority_vote",
        ),
        ValueError,
        ["majority_vote", "cannot work"],
    ),
    "two-phase-of-rounds": (
        lambda: efopt.error_feedback(
            efopt.power_sgd(1), axis_name=AXIS, exchange="two_phase"
        ),
        ValueError,
        ["two_phase", "cannot work", "whole leaves"],
    ),
    "fraction-zero": (
        lambda: efopt.top_k(fraction=0.0),
        ValueError,
        ["`top_k(fraction=...)`", RANGE, "got fraction=0.0"],
    ),
    "fraction-negative": (
        lambda: efopt.random_k(fraction=-0.5),
        ValueError,
        ["`random_k(fraction=...)`", RANGE, "got fraction=-0.5"],
    ),
    "fraction-above-one": (
        lambda: efopt.top_k(fraction=1.5),
        ValueError,
        ["`top_k(fraction=...)`", RANGE, "got fraction=1.5"],
    ),
    "fraction-nan": (
        lambda: efopt.top_k(fraction=float("nan")),
        ValueError,
        ["`top_k(fraction=...)`", RANGE, "got fraction=nan"],
    ),
    "fraction-array": (
        lambda: efopt.top_k(fraction=jnp.float32(0.5)),
        TypeError,
        [
            "`top_k(fraction=...)`",
            "must be a Python float",
            "static_args=('fraction',)",
        ],
    ),
    "fraction-bool": (
        lambda: efopt.top_k(fraction=True),
        TypeError,
        ["`top_k(fraction=...)`", "must be a Python float", "got bool"],
    ),
    "k-zero": (
        lambda: efopt.top_k(k=0),
        ValueError,
        ["`top_k(k=...)`", "must be at least 1", "got 0"],
    ),
    "k-negative": (
        lambda: efopt.random_k(k=-3),
        ValueError,
        ["`random_k(k=...)`", "must be at least 1", "got -3"],
    ),
    "k-float": (
        lambda: efopt.top_k(k=2.0),
        TypeError,
        ["`top_k(k=...)`", STATIC, "got float", "static_args=('k',)"],
    ),
    "k-bool": (
        lambda: efopt.random_k(k=True),
        TypeError,
        ["`random_k(k=...)`", STATIC, "got bool"],
    ),
    "k-above-block-size": (
        lambda: efopt.top_k(k=5, block_size=4),
        ValueError,
        ["`top_k(k=...)`", "must not exceed `block_size`", "k=5", "block_size=4"],
    ),
    "fraction-and-k": (
        lambda: efopt.top_k(fraction=0.1, k=1),
        ValueError,
        ["`top_k`", "exactly one of `fraction` and `k`", "fraction=0.1", "k=1"],
    ),
    "neither-fraction-nor-k": (
        lambda: efopt.random_k(),
        ValueError,
        ["`random_k`", "exactly one of `fraction` and `k`", "fraction=None", "k=None"],
    ),
    "block-size-zero": (
        lambda: efopt.scaled_sign(block_size=0),
        ValueError,
        ["`scaled_sign(block_size=...)`", "must be at least 1", "got 0"],
    ),
    "block-size-float": (
        lambda: efopt.scaled_sign(block_size=8.0),
        TypeError,
        ["`scaled_sign(block_size=...)`", STATIC, "got float"],
    ),
    "block-size-of-top-k": (
        lambda: efopt.top_k(k=1, block_size="8"),
        TypeError,
        ["`top_k(block_size=...)`", STATIC, "got str"],
    ),
    "seed-float": (
        lambda: efopt.random_k(k=1, seed=0.5),
        TypeError,
        ["`random_k(seed=...)`", "must be a Python int", "got float"],
    ),
    "seed-negative": (
        lambda: efopt.random_k(k=1, seed=-1),
        ValueError,
        ["`random_k(seed=...)`", "must be at least 0", "got -1"],
    ),
    "seed-too-wide": (
        lambda: efopt.random_k(k=1, seed=2**32),
        ValueError,
        ["`random_k(seed=...)`", "4294967296"],
    ),
    "compressor-factory": (
        lambda: feedback(efopt.sign),
        TypeError,
        ["`error_feedback(compressor)`", "`efopt.Compressor`", "`efopt.scaled_sign()`"],
    ),
    "compressor-optax": (
        lambda: efopt.compress(optax.sgd(0.1)),
        TypeError,
        ["`compress(compressor)`", "`efopt.Compressor`", "GradientTransformation"],
    ),
    "axis-name-twice": (
        lambda: feedback(efopt.sign(), axis_name=("data", "data")),
        ValueError,
        ["`error_feedback(axis_name=...)`", "an axis twice", "('data', 'data')"],
    ),
    "axis-name-empty": (
        lambda: efopt.compress(efopt.sign(), axis_name=()),
        TypeError,
        ["`compress(axis_name=...)`", "mapped axis", "tuple", "got ()"],
    ),
    "axis-name-int": (
        lambda: efopt.compress(efopt.sign(), axis_name=0),
        TypeError,
        ["`compress(axis_name=...)`", "mapped axis", "tuple", "got 0"],
    ),
    "axis-name-int-in-a-tuple": (
        lambda: efopt.compress(efopt.sign(), axis_name=("data", 0)),
        TypeError,
        ["`compress(axis_name=...)`", "mapped axis", "got ('data', 0)"],
    ),
    "exchange-by-position": (
        lambda: feedback(efopt.sign(), "data", "all_gather"),
        TypeError,
        ["`error_feedback", "`axis_name` by keyword", "axis_name='data'"],
    ),
    "every-by-position": (
        lambda: efopt.accumulate(*(optax.sgd(0.1), 2)),
        TypeError,
        ["`accumulate", "`every` by keyword", "every=2"],
    ),
    "axis-name-of-local-params": (
        lambda: efopt.local_params(PARAMS, 3),
        TypeError,
        ["`local_params(axis_name=...)`", "mapped axis", "got 3"],
    ),
    "no-axis-name-for-local-params": (
        lambda: efopt.local_params(PARAMS, None),
        TypeError,
        ["`local_params(axis_name=...)`", "mapped axis", "got None"],
    ),
    "exchange-unknown": (
        lambda: over_workers(exchange="ring"),
        ValueError,
        ["`error_feedback(exchange=...)`", "'all_reduce'", "'two_phase'", "got 'ring'"],
    ),
    "exchange-unhashable": (
        lambda: efopt.compress(efopt.sign(), axis_name=AXIS, exchange=["two_phase"]),
        ValueError,
        ["`compress(exchange=...)`", "'majority_vote'", "got ['two_phase']"],
    ),
    "exchange-without-axis": (
        lambda: feedback(efopt.sign(), exchange="all_gather"),
        ValueError,
        ["`error_feedback(exchange='all_gather')`", "`axis_name`", "one worker"],
    ),
    "sum-of-signs": (
        lambda: over_workers(exchange="all_reduce"),
        ValueError,
        ["exchange='all_reduce')`", "not linear", 'use exchange="all_gather"'],
    ),
    "two-phase-unblocked": (
        lambda: over_workers(exchange="two_phase"),
        ValueError,
        ["exchange='two_phase')`", "cannot be split", "`block_size`", '"all_gather"'],
    ),
    "vote-of-scaled-signs": (
        lambda: over_workers(efopt.scaled_sign(8), exchange="majority_vote"),
        ValueError,
        ["exchange='majority_vote')`", "plain signs", "use `efopt.sign()`"],
    ),
    "vote-of-values": (
        lambda: efopt.compress(
            efopt.random_k(k=1), axis_name=AXIS, exchange="majority_vote"
        ),
        ValueError,
        ["`compress(random_k(", "exchange='majority_vote')`", "use `efopt.sign()`"],
    ),
    "residual-dtype-integer": (
        lambda: feedback(efopt.sign(), residual_dtype=jnp.int32),
        TypeError,
        ["`error_feedback(residual_dtype=...)`", "floating-point dtype", "int32"],
    ),
    "residual-dtype-unknown": (
        lambda: feedback(efopt.sign(), residual_dtype="float12"),
        TypeError,
        ["`error_feedback(residual_dtype=...)`", "floating-point dtype", "float12"],
    ),
    "every-zero": (
        lambda: efopt.accumulate(optax.sgd(0.1), every=0, axis_name=AXIS),
        ValueError,
        ["`accumulate(every=...)`", "must be at least 1", "got 0"],
    ),
    "every-float": (
        lambda: efopt.accumulate(optax.sgd(0.1), every=2.0, axis_name=AXIS),
        TypeError,
        ["`accumulate(every=...)`", "must be a Python int", "got float"],
    ),
    "accumulate-without-axis": (
        lambda: efopt.accumulate(optax.sgd(0.1), every=2, axis_name=None),
        TypeError,
        ["`accumulate(axis_name=...)`", "the name of a mapped axis", "got None"],
    ),
    "per-worker-without-axis": (
        lambda: efopt.per_worker(optax.trace(0.9), axis_name=None),
        TypeError,
        ["`per_worker(axis_name=...)`", "the name of a mapped axis", "got None"],
    ),
    "zero-workers": (
        lambda: efopt.stack_workers(PARAMS, 0),
        ValueError,
        ["`stack_workers(tree, num_workers)`", "at least 1", "got 0"],
    ),
    "workers-float": (
        lambda: efopt.stack_workers(PARAMS, 4.0),
        TypeError,
        ["`stack_workers(tree, num_workers)`", "Python int", "got 4.0"],
    ),
    "workers-bool": (
        lambda: efopt.stack_workers(PARAMS, True),
        TypeError,
        ["`stack_workers(tree, num_workers)`", "Python int", "got True"],
    ),
    "measure-of-text": (
        lambda: efopt.wire.measure("%x = f32[8]{0} parameter(0)"),
        TypeError,
        [
            "`measure(fn, ...)`",
            "must be given a function",
            "got str",
            "`read_hlo(text)`",
        ],
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), OPTIONS.values(), ids=OPTIONS)
def test_option_is_refused(call, kind, words):
    refused(kind, words, call)


def test_two_phase_of_the_identity_names_a_cure_that_exists():
    with pytest.raises(ValueError) as caught:
        over_workers(efopt.compressors.identity(), exchange="two_phase")
    assert "block_size" not in str(caught.value)  # identity() has no such option


# name: (factory, its option, a value)
TRACED = {
    "k": (lambda k: efopt.error_feedback(efopt.top_k(k=k)), "k", 3),
    "bare-k": (efopt.top_k, "k", 3),
    "fraction": (efopt.top_k, "fraction", 0.5),
    "block_size": (efopt.scaled_sign, "block_size", 4),
    "every": (
        lambda every: efopt.accumulate(over_workers(), every=every, axis_name=AXIS),
        "every",
        2,
    ),
}


@pytest.mark.parametrize(("factory", "name", "value"), TRACED.values(), ids=TRACED)
def test_injected_option_needs_static_args(factory, name, value):
    words = [f"({name}=...)`", "must be a Python", f"`static_args=('{name}',)`"]
    made = optax.inject_hyperparams(factory)
    refused(TypeError, words, made(**{name: value}).init, PARAMS)
    # The cure that the message names.
    made = optax.inject_hyperparams(factory, static_args=(name,))
    made(**{name: value}).init(PARAMS)


UNDER_JIT = {
    "k": efopt.top_k,
    "block_size": efopt.scaled_sign,
    "every": TRACED["every"][0],
}


@pytest.mark.parametrize("name", UNDER_JIT)
def test_traced_option_is_refused_under_jit(name):
    def make(value):
        UNDER_JIT[name](**{name: value})
        return value

    refused(TypeError, [f"({name}=...)`", "static_args"], jax.jit(make), 3)


WITHOUT_AXIS = {"error_feedback": feedback, "compress": efopt.compress}


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
@pytest.mark.parametrize("name", [*WITHOUT_AXIS, "compressor"])
def test_leaf_that_is_no_float_is_named(name, dtype):
    tx = WITHOUT_AXIS.get(name, lambda c: c)(efopt.scaled_sign())
    api = f"`{name}(scaled_sign(" if name in WITHOUT_AXIS else "`scaled_sign("
    good = {"a": jnp.ones(2), "n": {"c": jnp.ones(3)}}
    bad = {"a": jnp.ones(2), "n": {"c": jnp.ones(3, dtype)}}
    words = [api, "floating-point", f"got {dtype}", "['n']['c']", "`optax.partition`"]
    refused(TypeError, words, tx.init, bad)
    refused(TypeError, words, tx.update, bad, tx.init(good))


def test_updates_of_another_structure_are_refused():
    tx = feedback(efopt.top_k(k=1))
    words = ["`error_feedback(top_k(k=1", "another structure", "`init`", "'b'", "'w'"]
    refused(ValueError, words, tx.update, {"w": PARAMS["w"]}, tx.init(PARAMS))


def test_updates_of_another_shape_are_refused():
    tx = feedback(efopt.top_k(k=1))
    turned = {**PARAMS, "w": PARAMS["w"].T}
    words = ["`error_feedback(top_k(k=1", "(4, 3)", "['w']", "`init`", "(3, 4)"]
    refused(ValueError, words, tx.update, turned, tx.init(PARAMS))


@pytest.mark.parametrize(
    "shapes",
    [{"w": (3, 4)}, {"b": (1,), "w": (3, 4)}, {"b": (9,), "w": (3, 4)}],
    ids=["structure", "smaller", "larger"],
)
def test_two_phase_compress_refuses_updates_that_init_did_not_see(shapes):
    # The residuals of the owners stand for the blocks that `init` counted.
    tx = efopt.compress(efopt.scaled_sign(4), axis_name=AXIS, exchange="two_phase")
    state = efopt.stack_workers(tx.init(PARAMS), 4)
    updates = {k: jnp.ones((4, *shape)) for k, shape in shapes.items()}
    step = jax.vmap(tx.update, axis_name=AXIS)
    words = ["`compress(scaled_sign(", "`init`"]
    refused(ValueError, words, jax.eval_shape, step, updates, state)


def test_local_params_outside_the_mapped_function_is_refused():
    words = ["`local_params`", "'data'", "`jax.shard_map`"]
    refused(ValueError, words, efopt.local_params, PARAMS, AXIS)


def test_update_outside_the_mapped_function_names_the_way_of_a_plain_step():
    tx = over_workers()
    words = ["'data'", "`efopt.value_and_grad(..., axis_name='data')`"]
    words += ["`axis_name=None` for a single worker"]
    refused(ValueError, words, tx.update, PARAMS, tx.init(PARAMS), PARAMS)


def test_update_under_another_axis_is_refused():
    tx = over_workers()
    update = jax.vmap(tx.update, in_axes=(0, None), axis_name="model")
    words = ["`error_feedback(scaled_sign(", "'data'", "none of that name is bound"]
    refused(ValueError, words, update, GRADS, tx.init(PARAMS))


def gradient_step(tx, mark):
    """A step on the loss <grads, params>, whose local gradient is ``grads``."""

    def step(params, state, grads):
        def loss(params):
            products = jax.tree.map(jnp.vdot, params, own(grads))
            return sum(jax.tree.leaves(products))

        grads = jax.grad(loss)(mark(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_the_one_leaf_that_is_already_summed_is_named(mesh):
    tx = over_workers()
    state = efopt.distribute(tx.init(PARAMS), mesh)

    def step(state, grads):
        grads = own(grads)
        grads["w"] = jax.lax.pmean(grads["w"], AXIS)
        return tx.update(grads, state)

    words = ["`error_feedback(scaled_sign(", "at ['w']:", "`efopt.local_params("]
    in_specs = (efopt.partition_specs(state), P(AXIS))
    refused(ValueError, words, trace, mesh, step, state, GRADS, in_specs=in_specs)


PLACED = ["`efopt.distribute(state, mesh)`", "`efopt.partition_specs(state)`"]
PLACED += ["`efopt.stack_workers(state, n)`", "'data'"]


def test_server_residual_passed_as_replicated_is_refused(mesh):
    tx = efopt.compress(efopt.scaled_sign(4), axis_name=AXIS, exchange="two_phase")

    def step(state, grads):
        return tx.update(own(grads), state)[0]

    words = ["`compress(scaled_sign(block_size=4", "not laid out", *PLACED]
    args, in_specs = (tx.init(PARAMS), GRADS), (P(), P(AXIS))
    refused(ValueError, words, trace, mesh, step, *args, in_specs=in_specs)


def test_state_stacked_without_the_inner_axis_is_refused_under_vmap():
    tx = over_workers()
    state = tx.init(PARAMS)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 8), state.residual.value)
    node = efopt.PerWorker(jax.tree.map(lambda x: x[:, 0], stacked), AXIS)
    state = state._replace(count=jnp.zeros(8, jnp.int32), residual=node)
    words = ["`error_feedback(scaled_sign(", "not laid out over the workers", *PLACED]
    refused(ValueError, words, jax.vmap(tx.update, axis_name=AXIS), GRADS, state)


def test_distribute_on_a_mesh_without_the_axis_is_refused():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    words = ["`distribute(tree, mesh)`", "'data'", "('model',)"]
    refused(ValueError, words, efopt.distribute, over_workers().init(PARAMS), mesh)


@pytest.mark.parametrize("exchange", ["all_gather", "two_phase"])
def test_state_of_another_number_of_workers_is_refused(mesh, exchange):
    tx = efopt.error_feedback(efopt.scaled_sign(4), axis_name=AXIS, exchange=exchange)
    half = jax.sharding.Mesh(np.array(jax.devices()[:4]), (AXIS,))
    state = efopt.distribute(tx.init(PARAMS), half)
    words = ["'data'", "(4, 5)", "for 8", "`tx.init(params)`"]
    refused(ValueError, words, efopt.distribute, state, mesh)
    refused(ValueError, words, efopt.stack_workers, state, 8)


def test_server_residual_of_another_number_of_workers_is_refused(mesh):
    # 5 blocks are 2 for each of 4 workers, 1 for each of 8.
    tx = efopt.compress(efopt.scaled_sign(4), axis_name=AXIS, exchange="two_phase")
    half = jax.sharding.Mesh(np.array(jax.devices()[:4]), (AXIS,))
    state = efopt.distribute(tx.init(PARAMS), half)
    words = ["'data'", "for 8", "`tx.init(params)`"]
    refused(ValueError, words, efopt.distribute, state, mesh)


def test_refusal_leaves_donated_arguments_alone(mesh):
    tx = over_workers()
    params, state = efopt.distribute((PARAMS, tx.init(PARAMS)), mesh)
    before = jax.tree.map(np.asarray, (params, state))
    specs = efopt.partition_specs(state)
    step = jax.shard_map(
        gradient_step(tx, lambda params: params),
        mesh=mesh,
        in_specs=(P(), specs, P(AXIS)),
        out_specs=(P(), specs),
    )
    step = jax.jit(step, donate_argnums=(0, 1))
    refused(ValueError, ["already equal on all workers"], step, params, state, GRADS)
    jax.tree.map(np.testing.assert_array_equal, before, (params, state))
