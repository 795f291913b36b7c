"""What was saved is said beside the arrays, and checked on the way back."""

import json

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from registry import AXIS, OPTIMIZERS, SCHEMES
from states import PARAMS, make, of_workers
from workers_under_test import make_mesh, slow

import efopt
from efopt.checkpoints import check, record, resize, target

ROWS = [row for row in (*SCHEMES, *OPTIMIZERS) if row.over_workers and row.own]


def through_json(saved):
    return json.loads(json.dumps(saved))


def feedback(*, sketch=None, **options):
    memory = None
    if sketch is not None:
        memory = efopt.compressors.count_sketch(fraction=0.3, seed=sketch)
    options = {"compressor": efopt.scaled_sign(16), **options}
    compressor = options.pop("compressor")
    return efopt.error_feedback(compressor, axis_name=AXIS, memory=memory, **options)


@pytest.mark.parametrize("row", [slow(r, when=not r.kind, id=r.name) for r in ROWS])
def test_a_record_is_of_any_number_of_workers_and_of_no_other_scheme(row):
    states = [of_workers(make(row), n) for n in (4, 3)]
    saved = [through_json(record(state)) for state in states]
    assert [x["workers"] for x in saved] == [{AXIS: 4}, {AXIS: 3}]
    check(saved[0], states[1])
    check(saved[1], jax.eval_shape(lambda: states[0]))
    check(saved[0], jax.eval_shape(make(row).init, PARAMS))
    other = of_workers(efopt.per_worker(optax.trace(0.5), axis_name=AXIS), 4)
    if row.name not in ("per_worker", "signum"):
        with pytest.raises(ValueError, match=r"check\(saved, state\)"):
            check(saved[0], other)


DIFFERENT = {
    "learning_rate": (
        {},
        {"learning_rate": 0.1},
        r"\.last_rate was saved with array none, and has float32\[\] now",
    ),
    "compressor": (
        {},
        {"compressor": efopt.top_k(k=3)},
        r"\.link\.home .* transformation .*scaled_sign.*, and has .*top_k",
    ),
    "exchange": ({}, {"exchange": "two_phase"}, r"exchange None, and has two_phase"),
    "hash": (
        {"sketch": 0},
        {"sketch": 1},
        r"\.residual .* memory's codec count_sketch.*seed=0.*, and has .*seed=1",
    ),
    "dtype": (
        {},
        {"residual_dtype": "bfloat16"},
        r"\.residual .* arrays \['b'\] float32\[5\], and has bfloat16\[5\] now",
    ),
    "start": ({}, {"start": 5}, r"start 0, and has 5 now"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_checkpoint_of_other_options_is_told_the_field_and_both(name):
    before, after, says = DIFFERENT[name]
    saved = record(of_workers(feedback(**before), 4))
    with pytest.raises(ValueError, match=says):
        check(through_json(saved), of_workers(feedback(**after), 4))
    with pytest.raises(ValueError, match=says):
        structs = jax.eval_shape(feedback(**after).init, PARAMS)
        target(structs, make_mesh("auto", 4), saved=saved)


def test_other_parameters_are_told_by_name():
    saved = record(of_workers(feedback(), 4))
    params = {**PARAMS, "w": np.zeros((16, 18), np.float32)}
    with pytest.raises(ValueError, match=r"\['w'\] float32\[16,17\], and has .*16,18"):
        check(saved, of_workers(feedback(), 4, params))


def test_a_stack_has_the_record_of_what_was_stacked():
    tx = efopt.accumulate(feedback(exchange="two_phase"), every=2, axis_name=AXIS)
    state = of_workers(tx, 4)
    assert record(efopt.stack_workers(state, 4)) == record(state)


def test_a_record_of_another_format_is_not_guessed_at():
    saved = {**record(of_workers(feedback(), 4)), "format": 2, "efopt": "9.0"}
    with pytest.raises(ValueError, match=r"format 1, and got one of format 2.*'9.0'"):
        check(saved, of_workers(feedback(), 4))


def test_lengths_are_told_of_every_axis_and_by_any_name():
    mesh = jax.make_mesh((2,), ("workers",))
    tx = efopt.error_feedback(efopt.sign(), axis_name="workers")
    state = jax.eval_shape(tx.init, PARAMS)
    old = target(state, mesh, saved={"workers": 5})
    assert {x.shape[0] for x in jax.tree.leaves(old.residual.value)} == {5}
    with pytest.raises(ValueError, match="over the axis 'workers'.*lengths are given"):
        target(state, mesh, saved={})


def test_orbax_restores_another_number_of_workers(tmp_path):
    """By the record, into a target of the old ones; `strict=False` would cut them."""
    tx = optax.chain(
        efopt.per_worker(optax.trace(0.9), axis_name=AXIS),
        feedback(exchange="two_phase"),
        optax.sgd(0.1),
    )
    state = of_workers(tx, 8)
    placed = efopt.distribute(state, make_mesh("auto", 8))
    with ocp.CheckpointManager(tmp_path) as manager:
        both = ocp.args.Composite(
            state=ocp.args.StandardSave(placed),
            record=ocp.args.JsonSave(record(placed)),
        )
        manager.save(0, args=both)
        manager.wait_until_finished()
        only = ocp.args.Composite(record=ocp.args.JsonRestore())
        saved = manager.restore(0, args=only)["record"]
        mesh = make_mesh("auto", 3)
        old = target(jax.eval_shape(tx.init, PARAMS), mesh, saved=saved)
        only = ocp.args.Composite(state=ocp.args.StandardRestore(old))
        restored = manager.restore(0, args=only)["state"]
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    new = efopt.distribute(resize(restored, mesh.shape), mesh)
    jax.tree.map(np.testing.assert_array_equal, new, resize(state, 3))
