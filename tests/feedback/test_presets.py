"""LoCo and DeMo against their papers, and what they break on purpose."""

import jax
import numpy as np
import optax
import oracle
import oracle_since
from test_estimates import AXIS, DECAY, follows, problem, schedule, simulate

import efopt

TOP, top = efopt.top_k(fraction=0.5), lambda x: oracle.top_k(x, fraction=0.5)


def test_demo_is_its_oracle():
    """Leaves of 11, a prime: tiles of one; and of 12 x 10, tiles of 4 x 2."""
    params, grads, x0, lists = problem(0)
    tx = efopt.optimizers.demo(
        schedule, decay=0.9, k=3, tile=4, weight_decay=DECAY, axis_name=AXIS
    )

    def compress(x):
        return oracle_since.dct_top_k(x, 3, 4)

    path = oracle_since.demo(x0, lists, schedule, compress, 0.9, DECAY)
    follows(simulate(tx, params, grads)[0], path)


def test_loco_is_its_oracle():
    """Eight-bit errors as the library writes them: 127 steps to the nearest a block."""
    params, grads, x0, lists = problem(1)
    # Errors of long leaves alone are stored in eight bits.
    grads["w"] = np.tile(grads["w"], (1, 1, 1, 3))
    params["w"] = np.tile(params["w"], (1, 3))
    x0[1] = np.tile(x0[1], (1, 3))
    lists = [[[b, np.tile(w, (1, 3))] for b, w in step] for step in lists]
    memory = efopt.quantize(8, block_size=16)
    tx = optax.chain(
        efopt.feedback.loco(
            TOP, beta=0.8, reset=7, memory=memory, axis_name=AXIS, exchange=None
        ),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(schedule),
    )

    def store(x):
        if x.size < 256:
            return x
        out = []
        for block in oracle.split_blocks(x, 16):
            step = oracle.rounded_up(np.abs(block).max() / 127)
            whole = np.floor(block / step + 0.5) if step else np.zeros_like(block)
            out.append(np.clip(whole, -127, 127) * step)
        return oracle.join_blocks(out, x.shape)

    path = oracle_since.loco(x0, lists, schedule, top, store, 0.8, 7, DECAY)
    assert max(x.size for x in x0) >= 256
    follows(simulate(tx, params, grads)[0], path)


def test_without_mean_and_reset_loco_is_contractive_error_feedback():
    params, grads, _, _ = problem(2, 10)
    options = dict(memory=efopt.quantize(8), axis_name=AXIS)
    ours = efopt.feedback.loco(TOP, beta=0.0, reset=None, exchange=None, **options)
    theirs = efopt.contractive_error_feedback(TOP, **options)
    got, want = (
        simulate(optax.chain(tx, optax.sgd(schedule)), params, grads)[0]
        for tx in (ours, theirs)
    )
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-6)


def test_what_is_lost_is_said_again_in_part_and_dropped_at_a_reset():
    """One gradient, of which top-1 leaves 1 out, and then none."""
    tx = efopt.feedback.loco(efopt.top_k(k=1), beta=0.5, reset=3)
    update = jax.jit(tx.update)
    grads, state, out = np.float32([1.0, -3.0]), tx.init(np.zeros(2, np.float32)), []
    for t in range(4):
        updates, state = update(grads if t == 0 else np.zeros_like(grads), state)
        out.append(np.asarray(updates)[0])
    # e = 1/2; said, and e = 1/2 e = 1/4; said, and forgotten; nothing
    np.testing.assert_array_equal(out, [0, 0.5, 0.25, 0])


# ----------------------------------------------------------------------- experiments
