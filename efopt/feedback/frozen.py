"""Frozen groups: parameters that stand still, at no bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def frozen() -> optax.GradientTransformation:
    """Updates of zero, equal on all workers: for what an optimizer leaves alone.

    In place of ``optax.set_to_zero()`` in :func:`optax.partition`. That one makes its
    zeros of each worker's own gradients, so that inside ``jax.shard_map`` their type
    says that they differ from worker to worker, and the parameters can no longer leave
    it as equal ("out_specs require replication"). These are made of nothing but shapes
    and dtypes: the types stay right, the checks on, and nothing is sent.

    Where set_to_zero is another's, put this behind it: ``chain(selective_transform(tx,
    freeze_mask=mask), masked(frozen(), mask))``.

    Shapes: any tree -> the same, dtypes kept; integers too.
    Cost: no bits.
    Properties: deterministic; zeros are equal on all workers, in their types too.
    Placement: stateless.

    Returns:
      An :class:`optax.GradientTransformation`.

    Examples:
      LoRA: the pretrained weight stands still, its low-rank change is trained, and
      the change alone is compressed and sent.

      >>> import jax, jax.numpy as jnp, optax
      >>> import efopt
      >>> train = optax.chain(
      ...     efopt.error_feedback(efopt.scaled_sign(), axis_name="data"),
      ...     optax.sgd(0.1))
      >>> tx = optax.partition(
      ...     {"lora": train, "base": efopt.feedback.frozen()},
      ...     {"w": "base", "a": "lora", "b": "lora"})
      >>> params = {"w": jnp.ones((8, 8)), "a": jnp.ones((8, 2)), "b": jnp.ones((2, 8))}
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> state = efopt.distribute((params, tx.init(params)), mesh)
      >>> specs = efopt.partition_specs(state)
      >>> def step(state, grads):
      ...     params, opt_state = state
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return optax.apply_updates(params, updates), opt_state
      >>> step = jax.jit(jax.shard_map(
      ...     step, mesh=mesh, in_specs=(specs, jax.P("data")), out_specs=specs))
      >>> grads = jax.device_put(params, jax.NamedSharding(mesh, jax.P("data")))
      >>> params, _ = step(state, grads)
      >>> print(params["w"][0, 0], params["a"][0, 0])
      1.0 0.9
    """

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(_zeros, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _zeros(x: Any) -> jax.Array:
    dtype = jnp.result_type(x)
    if dtype == jax.dtypes.float0:  # gradients of integers, which nothing can hold
        dtype = jnp.dtype(bool)
    return jnp.zeros(jnp.shape(x), dtype)
