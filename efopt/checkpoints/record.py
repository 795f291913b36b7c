"""A record of what was saved, beside the arrays, and its check on the way back."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efopt.exchanges.home import Home
from efopt.workers.axes import Axes
from efopt.workers.node import PerWorker, is_node
from efopt.workers.stacks import is_stacked

FORMAT = 1


def record(state: Any) -> dict[str, Any]:
    """Says what a state is, to be saved beside its arrays.

    Arrays alone do not say whose residual they are, over how many workers, or by which
    hash a sketch was written: restored for another transformation some of them fit, and
    mean something else. A record is a ``dict`` of strings, numbers, lists and such
    dicts: JSON's, Orbax's ``JsonSave`` and MessagePack's.

    Args:
      state: A state, a ``TrainState``, or anything that holds one, of arrays or
        structs; placed on a mesh, or stacked for ``pmap`` or ``vmap``.

    Returns:
      ``format``, the number 1; ``efopt``, the version that wrote it; ``workers``, the
      lengths of the workers' axes by name; and ``parts``, by their place in the state:
      shape and dtype of every array as one worker has it; of what is each worker's own
      the axes, the ranges that they own and what becomes of it on another number of
      workers; and of every exchange the transformation, with its compressor and the
      parameters that it was told of. Learning rates and other numbers of a
      transformation, which may change, are not in it.

    Raises:
      ValueError: If a part of the state is the share of a single worker.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> tx = efopt.error_feedback(efopt.top_k(k=1), axis_name="data")
      >>> state = efopt.stack_workers(tx.init(jnp.zeros(2)), 4)
      >>> found = efopt.checkpoints.record(state)
      >>> found["workers"], found["parts"][".residual"]["arrays"]
      ({'data': 4}, {'': 'float32[2]'})
    """
    workers: dict[str, int] = {}
    for _, x in _places(state):
        names = Axes.of("record", x.axis_name).names if is_node(x) else ()
        if names and x.sizes is not None and len(x.sizes) == len(names):
            workers.update(zip(names, map(int, x.sizes), strict=True))
    lead = len(workers) if is_stacked(state) else 0

    def part(x):
        if is_node(x):
            x.require_whole("`record`")
            return _of_node(x, lead)
        if isinstance(x, Home):
            return _of_home(x)
        return {"array": _text(x, jnp.shape(x)[lead:])}

    parts = {jax.tree_util.keystr(path): part(x) for path, x in _places(state)}
    try:
        version = importlib.metadata.version("efopt")
    except importlib.metadata.PackageNotFoundError:  # a checkout that nobody installed
        version = "unknown"
    return {"format": FORMAT, "efopt": version, "workers": workers, "parts": parts}


def check(saved: Mapping[str, Any], state: Any) -> None:
    """Raises if a state is not what a record says was saved.

    The number of workers may be another: see :func:`efopt.checkpoints.resize`.

    Args:
      saved: A :func:`record`.
      state: The state to restore into, or its structs; placed where the saved one was
        placed on a mesh with axes behind each worker.

    Returns:
      Nothing.

    Raises:
      ValueError: If a part of the one is not in the other, or differs: the error names
        it and both values. If the record is of a newer format.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> make = lambda seed: efopt.contractive_error_feedback(
      ...     efopt.random_block(fraction=0.1),
      ...     memory=efopt.compressors.count_sketch(fraction=0.2, seed=seed))
      >>> params = jnp.zeros((64, 64))
      >>> saved = efopt.checkpoints.record(make(0).init(params))
      >>> efopt.checkpoints.check(saved, make(0).init(params))
    """
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"`check(saved, state)` reads records of format {FORMAT}, and got one of "
            f"format {saved.get('format')!r}, written by efopt {saved.get('efopt')!r}."
        )
    old, new = dict(_flat(saved["parts"])), dict(_flat(record(state)["parts"]))
    for key in (*old, *(key for key in new if key not in old)):
        if old.get(key) != new.get(key):
            where, field = key
            raise ValueError(
                f"`check(saved, state)`: {where or 'the state'} was saved with "
                f"{field} {_shown(old, key)}, and has {_shown(new, key)} now. Restore "
                "into the state of the transformation that was saved."
            )


def _places(state: Any) -> list[tuple[Any, Any]]:
    is_part = lambda x: is_node(x) or isinstance(x, Home)  # noqa: E731
    return jax.tree_util.tree_flatten_with_path(state, is_leaf=is_part)[0]


def _of_node(node: PerWorker, stacked_axes: int) -> dict[str, Any]:
    """What is each worker's own, without the axes of workers and shards."""
    arrays, lead = {}, node.lead + stacked_axes
    paths = jax.tree_util.tree_flatten_with_path(node.value)[0]
    for (path, x), split in zip(paths, node.splits(), strict=True):
        skip, front = (lead, ()) if split is None else (lead + 1, (split,))
        shape = (*front, *jnp.shape(x)[skip:])
        arrays[jax.tree_util.keystr(path)] = _text(x, shape)
    found: dict[str, Any] = {
        "axes": list(Axes.of("record", node.axis_name).names),
        "rule": node.rule,
        "ranges": node.split is not None,
        "shards": list(node.shards),
        "arrays": arrays,
    }
    if node.store is not None:
        for field in ("codec", "damping", "form", "dtype"):
            found[f"memory's {field}"] = str(getattr(node.store, field))
    return found


def _of_home(home: Home) -> dict[str, Any]:
    """The exchange of a scheme, and what it was told of the parameters."""
    link = home.link
    found: dict[str, Any] = {
        "transformation": link.api,
        "exchange": repr(link.exchange),
        "start": link.start,
        "axes": list(link.axes.names),
        "parameters": {
            path: f"{dtype}{list(shape)}".replace(" ", "")
            for path, shape, dtype in zip(
                home.paths, home.shapes, home.dtypes, strict=True
            )
        },
        "axes behind each worker": {name: int(size) for name, size in home.inner},
    }
    if home.inner and home.specs is not None:
        pairs = zip(home.paths, home.specs, strict=True)
        found["specs"] = {path: str(spec) for path, spec in pairs}
    return found


def _text(x: Any, shape: tuple[int, ...]) -> str:
    return f"{jnp.result_type(x)}{list(shape)}".replace(" ", "")


def _flat(parts: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Any]]:
    """Every value of a record, by the place and the name of its field."""
    for where, fields in parts.items():
        for field, value in fields.items():
            if not isinstance(value, Mapping):
                yield (where, field), value
                continue
            for name, inner in value.items():
                yield (where, f"{field} {name}".strip()), inner


def _shown(values: Mapping[Any, Any], key: Any) -> str:
    return str(values[key]) if key in values else "none"
