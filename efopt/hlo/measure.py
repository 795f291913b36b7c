"""What one call of a step puts on the wire, from its compiled program."""

from collections.abc import Callable
from typing import Any

import jax

from efopt.hlo.mesh import Layout, meshes_of
from efopt.hlo.program import num_devices
from efopt.hlo.read import read_hlo
from efopt.hlo.report import WireReport

_UNPLACED = (
    "\nthe program is for one device: the abstract arguments have no `sharding`; give "
    "them one,\nas in `jax.ShapeDtypeStruct(shape, dtype, sharding=...)`"
)


def measure(
    fn: Callable[..., Any] | jax.stages.Lowered | jax.stages.Compiled,
    /,
    *args: Any,
    mesh: jax.sharding.Mesh | None = None,
    **kwargs: Any,
) -> WireReport:
    """Compiles ``fn`` for these arguments and reports what one call puts on the wire.

    Nothing is run, and donated arguments stay alive. Any step can be measured, also one
    without efopt in it. If its arguments or results lie on a mesh, each collective says
    which axes of the mesh it crosses, and the report sums bytes by axis.

    Args:
      fn: The step, under ``jax.jit``, ``jax.pmap`` or plain (then it is jitted); or, if
        it is lowered or compiled already, ``jax.jit(step).lower(...)`` or what its
        ``compile()`` returns, without further arguments.
      *args: Arguments of ``fn``: arrays, or :class:`jax.ShapeDtypeStruct` with
        shardings, which may lie on devices that are not there.
      mesh: The mesh of the step, if it is not that of its arguments, or they lie on
        meshes of several shapes.
      **kwargs: Keyword arguments of ``fn``.

    Returns:
      A :class:`WireReport`, in bytes per device.

    Raises:
      TypeError: If ``fn`` is not callable, or lowered already and given arguments; or
        ``mesh`` is no :class:`jax.sharding.Mesh`.
      ValueError: If the backend gives no HLO text, :func:`read_hlo` cannot read it, or
        ``mesh`` has another number of devices than the program.

    Examples:
      >>> import jax.numpy as jnp
      >>> from efopt.wire import measure
      >>> print(measure(lambda x: x + 1, jnp.zeros(3)))
      no collectives: nothing travels between workers
    """
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(
            "`measure(mesh=...)` must be a `jax.sharding.Mesh` with devices, got "
            f"{type(mesh).__name__}."
        )
    compiled = _compiled(fn, args, kwargs)
    text = compiled.as_text()
    if text is None:
        raise ValueError(
            "`measure(fn, ...)` needs the HLO text of the compiled step, but this "
            "backend gives none; compile for a CPU or, ahead of time, for a TPU."
        )
    collectives = read_hlo(text)
    given = jax.tree.leaves((args, kwargs))
    abstract = [x for x in given if isinstance(x, jax.ShapeDtypeStruct)]
    unplaced = abstract and all(x.sharding is None for x in abstract)
    note = _UNPLACED if unplaced else ""
    layout = _layout(text, mesh, compiled)
    if layout is None:
        return WireReport(collectives, note)
    return WireReport(tuple(map(layout.placed, collectives)), note, layout.axes)


def _layout(text: str, mesh: Any, compiled: Any) -> Layout | None:
    """Where the devices of the program stand in its mesh; ``None`` if none is known."""
    size = num_devices(text)
    if mesh is not None:
        return Layout(mesh, size or mesh.size)
    for place in ("input_shardings", "output_shardings"):
        if meshes := meshes_of(jax.tree.leaves(getattr(compiled, place, ()))):
            known = meshes[0] if len(meshes) == 1 else None
            return Layout(known, size or known.size) if known else None
    return None


def _compiled(fn: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(fn, jax.stages.Lowered | jax.stages.Compiled):
        if args or kwargs:
            raise TypeError(
                f"`measure(fn, ...)` takes no arguments for `fn` if it is a "
                f"`jax.stages.{type(fn).__name__}`: it is lowered for some already."
            )
        return fn.compile() if isinstance(fn, jax.stages.Lowered) else fn
    if not callable(fn):
        raise TypeError(
            f"`measure(fn, ...)` must be given a function, got {type(fn).__name__}; "
            "a text is read by `read_hlo(text)`."
        )
    lower = getattr(fn, "lower", None) or jax.jit(fn).lower
    return lower(*args, **kwargs).compile()
