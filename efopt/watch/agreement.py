"""Whether workers hold the same bits of what they should hold alike."""

import collections
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efopt.ground.checks import keyword_only, static_int
from efopt.ground.randomness import hash_words
from efopt.workers.axes import Axes, AxisName, manual_axes, vary_alike, varying
from efopt.workers.node import is_node


@keyword_only
def workers_agree(tree: Any, *, axis_name: AxisName) -> jax.Array:
    """Whether all workers hold the same bits of a tree. Inside the mapped step.

    For parameters and states, which go on as equal only because every worker computes
    the same of the same: a bit that flips in one worker's memory, or a transformation
    that decides by itself, parts them for good, and nothing else says so. Leaves of a
    :class:`efopt.PerWorker` are left out. Types do not matter: what ``shard_map`` takes
    for equal is looked at on every device. (In a step that leaves mesh axes behind a
    worker to the compiler, it decides which of a worker's copies is read.)

    Every leaf is hashed into one word, of which all workers take the largest and the
    smallest: a pass over what is checked and 8 bytes a leaf. One changed value of up
    to 32 bits is always found; several go unseen once in 2^32.

    Args:
      tree: A tree of arrays, such as parameters and the optimizer's state.
      axis_name: The mapped axis of the workers, or a tuple of axes.

    Returns:
      A bool, shape=(), equal on all workers. What differs, and where, is told by
      :func:`efopt.watch.require_agreement` of the placed arrays.

    Raises:
      TypeError: If ``axis_name`` is neither a string nor a tuple of strings.
      ValueError: If an axis is not bound.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import efopt
      >>> agree = lambda x: efopt.watch.workers_agree(x, axis_name="data")
      >>> jax.vmap(agree, axis_name="data")(jnp.array([1.0, 1.0]))
      Array([ True,  True], dtype=bool)
      >>> jax.vmap(agree, axis_name="data")(jnp.array([0.0, -0.0]))
      Array([False, False], dtype=bool)
    """
    axes = Axes.of("workers_agree", axis_name)
    cure = "; outside of it, `efopt.watch.require_agreement` looks at placed arrays"
    axes.require_bound("`workers_agree`", cure)
    # Devices that hold the same are compared: those of all workers, and those behind
    # one along which the type says that a leaf is equal.
    groups: dict[tuple[str, ...], list[jax.Array]] = collections.defaultdict(list)
    behind = [a for a in manual_axes() if a not in axes.names and axes.typed()]
    for _, x in _shared(tree):
        same = tuple(a for a in behind if a not in varying(x))
        groups[same].append(_hash(x))
    differ = [jnp.zeros([], jnp.float32)]
    for same, words in groups.items():
        h = jnp.stack(vary_alike(words))
        # The smallest is the complement of the largest complement.
        ends = Axes((*axes.names, *same)).max(jnp.stack([h, ~h]))
        differ.append(jnp.sum(ends[0] != ~ends[1], dtype=jnp.float32))
    return axes.sum_behind(sum(vary_alike(differ), jnp.zeros([]))) == 0


def require_agreement(tree: Any, *, stacked: int = 0) -> None:
    """Raises if devices hold other bits of what they should hold alike.

    For the host, between two steps: each device hashes its own part of every array, and
    the hashes of devices that hold the same part are compared, also across processes,
    which all must call this. Of a :class:`efopt.PerWorker` the devices behind one
    worker are compared.

    Args:
      tree: Global arrays on a mesh, such as a placed state; other leaves are ignored.
      stacked: Of a state that is stacked for ``pmap`` or ``vmap``: the number of
        leading axes of workers. Rows of what is not per worker must then be equal.

    Raises:
      RuntimeError: If devices, or rows, differ. It names leaf and devices.
      TypeError: If ``stacked`` is no int.
      ValueError: If no array is held by more than one, so that nothing can differ.

    Returns:
      Nothing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import efopt
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> params = efopt.distribute({"w": jnp.ones(3)}, mesh)
      >>> efopt.watch.require_agreement(params)
      >>> try:
      ...     rows = {"w": jnp.array([0.0, 0.0, 1.0])}
      ...     efopt.watch.require_agreement(rows, stacked=1)
      ... except RuntimeError as error:
      ...     print(str(error)[:46])
      other bits than most have worker 2 of ['w']. W
    """
    static_int("require_agreement", "stacked", stacked, least=0)
    groups = list(_rows(tree, stacked) if stacked else _devices(tree))
    if not groups:
        raise ValueError(
            "`require_agreement(tree)` found no array that several devices hold, so "
            "there is nothing to compare. Give it arrays placed by `efopt.distribute` "
            "on a mesh, or say how many leading axes of workers there are, `stacked=1`."
        )
    wrong = []
    for leaf, words in groups:
        usual = collections.Counter(words.values()).most_common(1)[0][0]
        others = [who for who, word in words.items() if word != usual]
        if others:
            wrong.append(f"{', '.join(others)} of {leaf}")
    if wrong:
        more = f", and so on, {len(wrong)} in all" if len(wrong) > 3 else ""
        raise RuntimeError(
            f"other bits than most have {'; '.join(wrong[:3])}{more}. What is equal on "
            "all workers has parted: a device computed or kept something wrong, or a "
            "transformation decides by what differs. Go back to a checkpoint that "
            "agrees."
        )


# Who holds the same part of a leaf, and a word of what each holds.
Words = Iterator[tuple[str, dict[str, int]]]


def _devices(tree: Any) -> Words:
    """By devices that hold the same part of an array on a mesh."""
    on: dict[Any, list[tuple[str, jax.Array, P]]] = collections.defaultdict(list)
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
            on[x.sharding.mesh].append((_name(path), x, x.sharding.spec))
    for mesh, named in on.items():
        names, xs, specs = zip(*named, strict=True)
        words = np.asarray(_words_of_all(mesh, xs, specs))
        row = {d: i for i, d in enumerate(mesh.devices.flat)}
        for leaf, (name, x) in enumerate(zip(names, xs, strict=True)):
            parts: dict[str, dict[str, int]] = collections.defaultdict(dict)
            for d, index in x.sharding.devices_indices_map(x.shape).items():
                who = f"device {d.id} (process {d.process_index})"
                parts[str(index)][who] = int(words[row[d], leaf])
            yield from ((name, held) for held in parts.values() if len(held) > 1)


def _words_of_all(mesh: Any, xs: Sequence[jax.Array], specs: Any) -> jax.Array:
    """A word of what every device holds of every array: uint32 (devices, arrays)."""
    everywhere = Axes(tuple(mesh.axis_names))

    def own(*xs):
        words = jnp.stack([everywhere.vary(_hash(x)) for x in xs])
        return everywhere.all_gather(words)

    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=P()))(*xs)


def _rows(tree: Any, stacked: int) -> Words:
    """By rows of what is stacked."""
    for name, x in _shared(tree):
        x = np.asarray(x)
        rows = x.reshape(math.prod(x.shape[:stacked]), -1)
        if len(rows) > 1:
            words = [zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in rows]
            yield name, {f"worker {i}": word for i, word in enumerate(words)}


def _shared(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves that are not each worker's own, by name."""
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_node)[0]
    return ((_name(path), x) for path, x in paths if not is_node(x))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"


def _hash(x: Any) -> jax.Array:
    """One word of an array: uint32, shape=().

    Each word of it is hashed with its place, by a bijection; in their sum, one that
    has changed cannot be hidden.
    """
    words = _words(jnp.asarray(x))
    place = jnp.zeros(words.shape, jnp.uint32)
    for d, size in enumerate(words.shape):
        along = lax.broadcasted_iota(jnp.uint32, words.shape, d)
        place = place * jnp.uint32(size % 2**32) + along
    return jnp.sum(hash_words(place, words), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array as uint32, of a wide dtype several a value."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    size = x.dtype.itemsize
    if size < 8 and (x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.integer)):
        return x.astype(jnp.uint32)
    return _cast(x, {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32))


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return lax.bitcast_convert_type(x, dtype).astype(jnp.uint32)
