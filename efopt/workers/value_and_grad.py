"""Each worker's own gradient in a plain jitted step, over global arrays."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from efopt.ground.checks import keyword_only
from efopt.workers.axes import Axes, AxisName
from efopt.workers.node import PerWorker, is_node


@keyword_only
def value_and_grad(
    fun: Callable[..., Any],
    *,
    axis_name: AxisName,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    average_aux: bool = True,
) -> Callable[..., Any]:
    """``jax.value_and_grad``, with the gradient of each worker left its own.

    For a jitted step over global arrays, on a mesh one axis of which joins the workers:
    slices, or hosts, with parameters sharded in any way behind each. Every worker takes
    its part of the batch; what comes out is the mean loss and the workers' gradients,
    stacked and marked, for the ``update`` of a transformation with the same
    ``axis_name``. Nothing of efopt's crosses that axis but the loss::

      @jax.jit
      def step(state, batch):
        loss, grads = efopt.value_and_grad(loss_fn, axis_name="dcn")(
            state["params"], batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}, loss

    Place the state with ``efopt.distribute(state, mesh, params_specs)`` before.

    On an Explicit mesh a model that is written for reduced types may do without: of
    gradients typed as unreduced over the workers' axes each worker has its own term,
    and a transformation takes them as they are, the average being their sum.

    Where a model leaves the layout of its activations to the compiler, above all behind
    an embedding that is sharded by its vocabulary, that may move them over any axis,
    this one too. Constrain them (``jax.lax.with_sharding_constraint``), and hold the
    step to it with ``efopt.wire.check(step, ..., axis=..., at_most=...)``.

    Args:
      fun: A scalar function, or one that returns a scalar and something else if
        ``has_aux``; of this worker's batch alone, without collectives.
      axis_name: The mesh axis of the workers, or a tuple of axes.
      argnums: The arguments to differentiate with respect to.
      batch_argnums: The arguments that are batches: pytrees of arrays whose first axis
        is cut into one part a worker. All others go to every worker as they are, but
        typed random keys (``jax.random.key``) among them are folded with the worker,
        and an argument that is an :class:`efopt.PerWorker`, as
        ``efopt.local_params(params, axis_name, state)`` gives, has a row for each.
      has_aux: Whether ``fun`` returns something else beside the scalar.
      average_aux: Whether that is averaged over the workers, as batch statistics are;
        else it comes stacked, each array ``(workers, ...)``.

    Returns:
      A function of the arguments of ``fun`` that returns ``(value, grads)``, or
      ``((value, aux), grads)``. ``value`` is the mean over workers; ``grads`` is an
      :class:`efopt.PerWorker` whose arrays are ``(workers, *shape)``, sharded over
      ``axis_name``.

    Raises:
      TypeError: If ``axis_name`` is neither a string nor a tuple of strings.
      ValueError: When called, if no argument lies on a mesh with that axis, a batch
        cannot be cut into as many parts, or the step is mapped over the axis already.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> mesh = jax.make_mesh((1,), ("dcn",), devices=jax.devices()[:1])
      >>> params = efopt.distribute({"w": jnp.ones(3)}, mesh)
      >>> loss_fn = lambda params, x: jnp.mean(x @ params["w"])
      >>> step = jax.jit(efopt.value_and_grad(loss_fn, axis_name="dcn"))
      >>> loss, grads = step(params, jnp.ones((4, 3)))
      >>> grads.value["w"].shape
      (1, 3)
    """
    axes = Axes.of("value_and_grad", axis_name)
    batches = (batch_argnums,) if isinstance(batch_argnums, int) else batch_argnums
    inner = jax.value_and_grad(fun, argnums, has_aux)

    def wrapped(*args: Any) -> Any:
        if axes.bound():
            raise ValueError(
                "`value_and_grad` is for a step over global arrays, and this one is "
                f"mapped over {axes.key!r} already. Here take `jax.value_and_grad` "
                f"with respect to `efopt.local_params(params, {axes.key!r})`."
            )
        mesh = mesh_of(args, axes)
        n = axes.size_on(mesh)
        explicit = AxisType.Explicit in mesh.axis_types

        def along(i, x):
            if i in batches:
                return True
            typed = _is_array(x) and jnp.result_type(x)
            return typed and jnp.issubdtype(typed, jax.dtypes.prng_key)

        def ready(i, path, x):
            if i in batches:
                return _parted(path, x, n, axes, mesh)
            if along(i, x):
                keys = jax.vmap(jax.random.fold_in, (None, 0))(x, jnp.arange(n))
                rows = NamedSharding(mesh, P(axes.key))
                return jax.reshard(keys, rows) if explicit else keys
            return x

        flat, ways, trees = [], [], []
        for i, arg in enumerate(args):
            own = is_node(arg)  # each worker's own already, such as its drift
            paths, tree = jax.tree_util.tree_flatten_with_path(
                arg.value if own else arg
            )
            flat += [x if own else ready(i, path, x) for path, x in paths]
            ways += [0 if own or along(i, x) else None for _, x in paths]
            trees.append(tree)
        everything = jax.tree_util.treedef_tuple(trees)
        arrays = [_is_array(x) for x in flat]

        def each(*given: Any) -> Any:
            rest = iter(given)
            filled = [next(rest) if a else x for a, x in zip(arrays, flat, strict=True)]
            return inner(*everything.unflatten(filled))

        found, grads = jax.vmap(
            each,
            tuple(itertools.compress(ways, arrays)),
            spmd_axis_name=None if explicit else axes.key,
        )(*itertools.compress(flat, arrays))
        if not explicit:
            grads = jax.tree.map(lambda g: _constrained(g, axes, mesh), grads)
        mean = lambda x: jnp.mean(x, axis=0)  # noqa: E731
        if has_aux:
            value, aux = found
            aux = jax.tree.map(mean, aux) if average_aux else aux
            found = mean(value), aux
        else:
            found = mean(found)
        return found, PerWorker(grads, axes.key)

    return wrapped


def mesh_of(
    tree: Any, axes: Axes, api: str = "value_and_grad"
) -> jax.sharding.AbstractMesh:
    """The mesh with the workers' axes on which a tree lies, from its types."""
    meshes: list[Any] = [jax.sharding.get_abstract_mesh()]
    for x in filter(_is_array, jax.tree.leaves(tree)):
        sharding = getattr(jax.typeof(x), "sharding", None)
        meshes.append(getattr(sharding, "mesh", None))
    for mesh in meshes:
        if mesh is not None and set(axes.names) <= set(mesh.axis_names):
            return mesh
    raise ValueError(
        f"`{api}`: `axis_name={axes.key!r}` must name axes of the mesh on which the "
        "arguments lie, and none of them lies on one. Place the state with "
        "`efopt.distribute(state, mesh, params_specs)`."
    )


def _is_array(x: Any) -> bool:
    """Whether JAX takes it; others, such as a model, are passed on as they are."""
    try:
        jax.typeof(x)
    except TypeError:
        return False
    return True


def _parted(path: Any, x: Any, n: int, axes: Axes, mesh: Any) -> jax.Array:
    """A batch ``(n * size, ...)`` as ``(n, size, ...)``, one row a worker."""
    if jnp.ndim(x) == 0 or jnp.shape(x)[0] % n:
        raise ValueError(
            f"`value_and_grad` cuts the first axis of a batch into {n} parts, one for "
            f"each worker along {axes.key!r}; got shape {jnp.shape(x)} at "
            f"{jax.tree_util.keystr(path) or 'the batch'}."
        )
    shape = (n, jnp.shape(x)[0] // n, *jnp.shape(x)[1:])
    if AxisType.Explicit not in mesh.axis_types:
        return _constrained(jnp.reshape(x, shape), axes, mesh)
    spec = tuple(jax.typeof(x).sharding.spec) or (None,)
    first = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    rest = tuple(a for a in first if a is not None and a not in axes.names)
    x = jax.reshard(x, NamedSharding(mesh, P((*axes.names, *rest), *spec[1:])))
    parts = NamedSharding(mesh, P(axes.key, rest or None, *spec[1:]))
    return jax.lax.reshape(x, shape, out_sharding=parts)


def _constrained(x: jax.Array, axes: Axes, mesh: Any) -> jax.Array:
    """``x`` with one row a worker, and the compiler's choice behind it."""
    free = [P.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(axes.key, *free)))
