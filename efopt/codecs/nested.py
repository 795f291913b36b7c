"""Values inside blocks, as blocks of another codec that writes them."""

from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Blocks, Turn
from efopt.codecs.codec import Codec, Message, Payload


def write(codec: Codec, values: jax.Array, blocks: Blocks, turn: Turn) -> Payload:
    """The payload of ``values``, ``(n, *shape)`` in the compute dtype.

    Every array keeps the blocks that hold the values as its first axis.
    """
    n = values.shape[0]
    x, inner = split(codec, values, blocks, blocks.dtype)
    payload = codec.encode(x, inner, turn)
    return jax.tree.map(lambda a: a.reshape(n, -1, *a.shape[1:]), payload)


def read(
    codec: Codec, payload: Payload, shape: tuple[int, ...], blocks: Blocks, turn: Turn
) -> jax.Array:
    """Inverse of :func:`write`: values ``(n, *shape)`` in the compute dtype."""
    inner = _inner(codec, shape, blocks, blocks.dtype)
    payload = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), payload)
    return merge(codec.decode(payload, inner, turn), shape, blocks)


def ask(
    codec: Codec, values: jax.Array, blocks: Blocks, dtype: Any, turn: Turn, number: int
) -> Generator[Message, Message, tuple[jax.Array, jax.Array]]:
    """One round of a conversation: asks for the mean of ``values`` over workers.

    Args:
      codec: Writes the values.
      values: ``(n, *shape)`` in the compute dtype.
      blocks: The blocks that hold them.
      dtype: The dtype that they travel in, where the codec changes nothing.
      turn: The step and this worker.
      number: Of the round: two messages of one step differ in their private random
        numbers. Static.

    Returns:
      The mean, and what this worker itself has said, as ``values``.
    """
    x, inner = split(codec, values, blocks, dtype)
    turn = turn._replace(worker=turn.worker + np.uint32(number << 16))
    message = codec.write(x, inner, turn)
    mean = yield message
    shape = values.shape[1:]
    own = merge(message.decode(), shape, blocks)
    return merge(mean.decode(), shape, blocks), own


def split(
    codec: Codec, values: jax.Array, blocks: Blocks, dtype: Any
) -> tuple[jax.Array, Blocks]:
    """Values ``(n, *shape)``, which hold ``dtype``, as blocks of ``codec``."""
    n, *shape = values.shape
    inner = _inner(codec, tuple(shape), blocks, dtype)
    flat = values.reshape(n, -1)
    padding = inner.index.shape[0] // n * inner.size - flat.shape[1]
    if padding:
        flat = jnp.pad(flat, ((0, 0), (0, padding)))
    return flat.reshape(-1, *inner.shape), inner


def merge(x: jax.Array, shape: tuple[int, ...], blocks: Blocks) -> jax.Array:
    """Inverse of :func:`split`."""
    n, size = blocks.index.shape[0], int(np.prod(shape))
    return x.reshape(n, -1)[:, :size].reshape(n, *shape)


def _inner(codec: Codec, shape: tuple[int, ...], blocks: Blocks, dtype: Any) -> Blocks:
    """What ``codec`` may know of values of ``shape`` inside every block."""
    total = int(np.prod(shape))
    per, *block = codec.block_shape(shape)
    if codec.block_size is not None:  # as even as possible: the least padding
        per = -(-total // codec.block_size)
        block = [-(-total // per)]
    number = jnp.arange(per, dtype=jnp.uint32)
    index = (blocks.index[:, None] * np.uint32(per) + number[None, :]).reshape(-1)
    size = int(np.prod(block))
    if per * size == total:
        return Blocks(index, None, None, tuple(block), dtype)
    n, count = blocks.index.shape[0], np.full(per, size, np.int32)
    count[-1] = total - (per - 1) * size
    weight = jnp.asarray(1 / count, blocks.compute_dtype)
    count = jnp.asarray(count)
    return Blocks(index, jnp.tile(count, n), jnp.tile(weight, n), tuple(block), dtype)
