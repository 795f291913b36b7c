"""The compressor as users meet it: an Optax transformation with a wire format."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efopt.codecs.blocks import Turn
from efopt.codecs.codec import Codec, Payload
from efopt.codecs.conversation import alone, converse
from efopt.codecs.layout import lay_out
from efopt.codecs.states import close_states, init_states, open_states
from efopt.ground import bits
from efopt.ground.dtypes import check_float, compute_dtype


class RoundTripState(NamedTuple):
    """State of a compressor chained by itself.

    Attributes:
      count: Steps taken. shape=(), int32.
      codec: The compressor's own state for each leaf; ``()`` if it has none.
    """

    count: jax.typing.ArrayLike
    codec: Any


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A module-level function bound to a codec: equal, hashable and picklable."""

    function: Callable[..., Any]
    codec: Codec

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.codec, *args, **kwargs)


class Compressor(optax.GradientTransformationExtraArgs):
    """A lossy map on arrays with a wire format and a declared contract.

    It is an :class:`optax.GradientTransformation`: chained by itself it replaces each
    leaf by what a receiver would read, without feedback and without workers. Give it to
    :func:`efopt.error_feedback` or :func:`efopt.compress` to send it.

    Compressors are immutable and compare, hash, copy, pickle and print by their
    options. Make one with a factory such as :func:`efopt.scaled_sign`.
    """

    @property
    def codec(self) -> Codec:
        """The codec that does the work: a frozen dataclass."""
        return self.init.codec  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return repr(self.codec)

    @property
    def linear(self) -> bool:
        """Whether payloads may be summed, as ``exchange="all_reduce"`` does."""
        return self.codec.linear

    @property
    def unbiased(self) -> bool:
        """Whether ``E C(x) = x``."""
        return self.codec.unbiased

    @property
    def block_size(self) -> int | None:
        """Coordinates compressed as one unit; ``None``: the whole leaf or more."""
        return self.codec.block_size

    def delta(self, shape: tuple[int, ...]) -> float | None:
        """Contraction factor for a leaf of ``shape``, or ``None`` if it has none.

        ``E|C(x) - x|^2 <= (1 - delta) |x|^2`` for every ``x``.
        """
        if math.prod(shape) == 0:  # an empty leaf loses nothing
            return None if self._codec((1,)).delta((1,)) is None else 1.0
        return self._codec(shape).delta(tuple(shape))

    def omega(self, shape: tuple[int, ...]) -> float | None:
        """Variance factor for a leaf of ``shape``, or ``None`` if it is biased.

        ``E C(x) = x`` and ``E|C(x) - x|^2 <= omega |x|^2`` for every ``x``.
        """
        if math.prod(shape) == 0:
            return None if self._codec((1,)).omega((1,)) is None else 0.0
        return self._codec(shape).omega(tuple(shape))

    def _codec(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Codec:
        """The codec of a tree that is one leaf."""
        return self.codec.assign(jax.ShapeDtypeStruct(tuple(shape), dtype))[0]

    def payload_bits(
        self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
    ) -> int:
        """Bits that one worker hands to the exchange for one leaf, one way.

        The arrays of the payload, padding of blocks included; the carrier may round
        each array up to whole 32-bit words.
        """
        shape, dtype = tuple(shape), jnp.dtype(dtype)
        codec, bits_seen = self._codec(shape, dtype), []
        layout = lay_out([codec], [shape], [dtype])

        def count(messages):
            arrays = jax.tree.leaves([m.payload for m in messages.values()])
            bits_seen.extend(8 * a.size * a.dtype.itemsize for a in arrays)
            return alone(messages)

        def talk(x, step):
            states = layout.join_blocked([codec.init(shape, dtype)])
            xs = layout.join([x])
            converse(layout, xs, states, [_turn(step)] * len(xs), count)

        x = jax.ShapeDtypeStruct(shape, compute_dtype(dtype))
        jax.eval_shape(talk, x, jax.ShapeDtypeStruct((), jnp.uint32))
        return sum(bits_seen)

    def compress(self, x: jax.Array, step: jax.typing.ArrayLike = 0) -> Payload:
        """The payload of one array: a pytree of arrays, block axis first.

        Args:
          x: A floating-point array of any shape, not empty.
          step: Selects the random numbers, equal on sender and receiver.

        Raises:
          TypeError: If the compressor speaks in several rounds, or ``x`` is no float.
          ValueError: If ``x`` is empty.
        """
        x = jnp.asarray(x)
        dtype = check_float((), x, "`compress(x)`")
        if x.size == 0:
            raise ValueError(
                f"`compress(x)` needs at least one coordinate, got shape {x.shape}: an "
                "empty leaf sends nothing."
            )
        codec = self._codec(x.shape, dtype)
        layout = lay_out([codec], [x.shape], [dtype])
        (blocks,) = layout.join([x])
        return codec.encode(blocks, layout.buckets[0].blocks(), _turn(step))

    def decompress(
        self,
        payload: Payload,
        shape: tuple[int, ...],
        dtype: jax.typing.DTypeLike = jnp.float32,
        step: jax.typing.ArrayLike = 0,
    ) -> jax.Array:
        """What a receiver reads from :meth:`compress`: ``shape``, rounded to ``dtype``.

        Args:
          payload: The payload.
          shape: The shape of the array that was compressed.
          dtype: Its dtype.
          step: The step given to :meth:`compress`.
        """
        codec = self._codec(shape, dtype)
        layout = lay_out([codec], [tuple(shape)], [jnp.dtype(dtype)])
        blocks = layout.buckets[0].blocks()
        decoded = codec.decode(payload, blocks, _turn(step))
        out = bits.cast(blocks.mask(decoded), dtype)
        return layout.part([out], [jnp.zeros(shape, dtype)])[0]


def make(codec: Codec) -> Compressor:
    """The compressor of a codec."""
    return Compressor(_Bound(_init, codec), _Bound(_update, codec))  # type: ignore


def _turn(step: jax.typing.ArrayLike) -> Turn:
    return Turn(jnp.asarray(step).astype(jnp.uint32), jnp.uint32(0))


def _init(codec: Codec, params: optax.Params) -> RoundTripState:
    state = init_states(codec, params, f"`{codec}`")
    return RoundTripState(jnp.zeros([], jnp.int32), state)


def _update(codec, updates, state, params=None, **extra_args):
    del params, extra_args
    paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
    dtypes = [check_float(path, leaf, f"`{codec}`") for path, leaf in paths]
    arrays = [jnp.asarray(x) for _, x in paths]
    layout = lay_out(codec.assign(updates), [x.shape for x in arrays], dtypes)
    turn = _turn(state.count)
    states = open_states(layout, treedef, state.codec)
    turns = [turn] * len(layout.buckets)
    means, _, states = converse(layout, layout.join(arrays), states, turns, alone)
    states = close_states(layout, treedef, states, state.codec)
    pairs = zip(means, layout.buckets, strict=True)
    out = [bits.cast(mean.decode(), b.dtype) for mean, b in pairs]
    out = treedef.unflatten(layout.part(out, arrays))
    return out, RoundTripState(optax.safe_increment(state.count), states)
