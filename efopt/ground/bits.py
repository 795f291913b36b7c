"""Bit packing and rounding, alike on every backend.

Everything here is exact and the same under ``jit`` as without it, on CPU, GPU and
TPU. That is not a matter of course: a compiler is free to remove
``x.astype(bfloat16).astype(float32)``, and GPU compilers do, taking with it the very
rounding error that error feedback exists to keep.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TINY = 2.0**-118  # quantisers send a block below it as zeros: its step is subnormal


def pack_bits(bits: jax.Array) -> jax.Array:
    """Packs booleans ``(n, size)`` eight to a byte: uint8 ``(n, ceil(size / 8))``.

    Bit ``j`` of byte ``w`` holds coordinate ``j * ceil(size / 8) + w``, so that packing
    reads eight long runs instead of one strided one. Unused bits are zero.
    """
    return _pack_field(bits, 1)


def pack_tests(x: jax.Array, test: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """:func:`pack_bits` of a test of numbers ``(n, size)``, which -1 fails.

    Each run is cut out before it is tested. XLA's compiler for GPUs then computes ``x``
    where it is read; else it writes that first, beyond some size, and reads it again.
    """
    n, size = x.shape
    run = -(-size // 8)
    x = jnp.pad(x, ((0, 0), (0, 8 * run - size)), constant_values=-1)
    lanes = x.reshape(n, 8, run)
    shifted = [test(lanes[:, j]).astype(jnp.uint8) << np.uint8(j) for j in range(8)]
    return functools.reduce(operator.or_, shifted)


def unpack_bits(packed: jax.Array, size: int) -> jax.Array:
    """Inverse of :func:`pack_bits`: uint8 ``(n, width)`` to bool ``(n, size)``."""
    return _unpack_field(packed, 1, size).astype(bool)


def pack_uints(x: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Packs unsigned integers ``(n, size)`` below ``2**bits``, of at most 32 bits.

    They are cut into fields of 8, 4, 2 or 1 bits, the low ones first, of which 1, 2, 4
    or 8 share a byte: for three bits, uint8 ``(n, ceil(size / 4))`` and ``(n,
    ceil(size / 8))``; for twelve ``(n, size)`` and ``(n, ceil(size / 2))``. Unused bits
    are zero.
    """
    packed, low = [], 0
    for width in _fields(bits):
        field = (x >> x.dtype.type(low)) & x.dtype.type(2**width - 1)
        packed.append(_pack_field(field.astype(jnp.uint8), width))
        low += width
    return tuple(packed)


def unpack_uints(packed: tuple[jax.Array, ...], bits: int, size: int) -> jax.Array:
    """Inverse of :func:`pack_uints`: ``(n, size)``, uint8, or uint32 above 8 bits."""
    x, low, dtype = None, 0, np.uint8 if bits <= 8 else np.uint32
    for field, width in zip(packed, _fields(bits), strict=True):
        part = _unpack_field(field, width, size).astype(dtype)
        x = part if x is None else x | (part << dtype(low))
        low += width
    assert x is not None
    return x


def _fields(bits: int) -> list[int]:
    return [8] * (bits // 8) + [width for width in (4, 2, 1) if bits & width]


def _pack_field(x: jax.Array, width: int) -> jax.Array:
    lanes = 8 // width
    if lanes == 1:
        return x
    n, size = x.shape
    run = -(-size // lanes)
    x = jnp.pad(x, ((0, 0), (0, lanes * run - size))).reshape(n, lanes, run)
    shifted = [x[:, j].astype(jnp.uint8) << np.uint8(width * j) for j in range(lanes)]
    return functools.reduce(operator.or_, shifted)


def _unpack_field(packed: jax.Array, width: int, size: int) -> jax.Array:
    lanes = 8 // width
    if lanes == 1:
        return packed
    shift = jnp.arange(lanes, dtype=jnp.uint8)[None, :, None] * np.uint8(width)
    x = (packed[:, None, :] >> shift) & np.uint8(2**width - 1)
    return x.reshape(packed.shape[0], -1)[:, :size]


def pack_trits(x: jax.Array) -> jax.Array:
    """Packs integers below 3, uint8 ``(n, size)``, five to a byte: 1.6 bits each.

    Digit ``j`` of byte ``w``, in base 3, holds coordinate ``j * ceil(size / 5) + w``.
    """
    n, size = x.shape
    run = -(-size // 5)
    x = jnp.pad(x, ((0, 0), (0, 5 * run - size))).reshape(n, 5, run)
    digits = [x[:, j] * np.uint8(3**j) for j in range(5)]
    return functools.reduce(operator.add, digits)


def unpack_trits(packed: jax.Array, size: int) -> jax.Array:
    """Inverse of :func:`pack_trits`: uint8 ``(n, width)`` to uint8 ``(n, size)``."""
    wide = packed.astype(jnp.uint32)[:, None, :]
    # x // 3**j for x < 243, as a product and a shift: no division on any backend.
    factor = np.array([-(-(2**16) // 3**j) for j in range(5)], np.uint32)
    digits = (wide * jnp.asarray(factor)[None, :, None]) >> np.uint32(16)
    digits = digits - np.uint32(3) * ((digits * np.uint32(171)) >> np.uint32(9))
    return digits.astype(jnp.uint8).reshape(packed.shape[0], -1)[:, :size]


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rounds ``x`` to the nearest value of ``dtype`` and keeps its own dtype.

    The result converts to ``dtype`` exactly, values beyond its range saturate, and no
    compiler removes the rounding. A ``dtype`` at least as wide as that of ``x`` changes
    nothing.
    """
    info, own = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if info.nmant >= own.nmant and info.nexp >= own.nexp:
        return x
    if float(info.max) < float(own.max):
        largest = jnp.asarray(info.max, x.dtype)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    rounded = lax.reduce_precision(x, own.nexp, min(info.nmant, own.nmant))
    if info.nexp < own.nexp:
        # Subnormals have fewer digits: they lie on one uniform grid.
        grid = float(info.smallest_subnormal)
        fine = jnp.round(x * (1 / grid)) * grid
        rounded = jnp.where(jnp.abs(x) < float(info.smallest_normal), fine, rounded)
    return rounded


def cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Converts ``x`` to ``dtype`` with a rounding that ``jit`` cannot remove."""
    return round_to(x, dtype).astype(dtype)


def cast_like(tree: Any, like: Any) -> Any:
    """A tree of arrays in the dtypes of another, rounded where those are shorter.

    For what a state keeps: its dtypes are those that it came in, whatever was computed.
    """

    def one(x, old):
        dtype = jnp.result_type(old)
        return cast(x, dtype) if jnp.issubdtype(dtype, jnp.floating) else x

    return jax.tree.map(one, tree, like)


def round_up(x: jax.Array) -> jax.Array:
    """``x >= 0`` rounded up to few digits: the product with an 8-bit integer is exact.

    Eight significant bits for float32, at most ``1 + 2**-7`` times larger; 31 for
    float64. A product that needs no rounding is the same whether or not a compiler
    fuses it with a following addition.
    """
    info = jnp.finfo(x.dtype)
    kept = 7 if info.bits == 32 else 30
    return lax.reduce_precision(x * (1 + 2.0 ** -(kept + 1)), info.nexp, kept)


def float_of_exponent(exponent: jax.Array) -> jax.Array:
    """float32 from a biased exponent, uint32: zero for 0, infinity for 255."""
    return lax.bitcast_convert_type(exponent << np.uint32(23), jnp.float32)
