"""The contract of a compressor: a codec for blocks, and the conversation it holds.

A codec is a frozen, hashable dataclass that knows how an array becomes a payload and
back. It knows nothing of workers, residuals or collectives: it *yields* what it wants
averaged and is *sent* the average.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Hashable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Blocks, Turn
from efopt.ground import bits
from efopt.ground.barriers import LARGE, once

Payload = Any
Rounds = Generator["Message | Batch", Any, tuple["Message", jax.Array, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Message:
    """A payload, and all that its receiver needs to read it.

    Attributes:
      codec: Reads the payload.
      payload: Pytree of arrays, each with the block axis first.
      blocks: What the payload stands for.
      turn: When it was made. Receivers share ``turn.step``, never ``turn.worker``.
    """

    codec: "Codec"
    payload: Payload
    blocks: Blocks
    turn: Turn

    def with_payload(self, payload: Payload) -> "Message":
        """The same message about another payload, such as another worker's."""
        return dataclasses.replace(self, payload=payload)

    def once(self) -> "Message":
        """The same message; if it is large, its payload is computed only once."""
        if self.blocks.coordinates < LARGE:
            return self
        return self.with_payload(once(self.payload))

    def decode(self) -> jax.Array:
        """The blocks that the payload stands for, ``(n, *shape)``, padding zero."""
        return self.blocks.mask(self.codec.decode(self.payload, self.blocks, self.turn))

    def decode_in(self, zeros: jax.Array) -> jax.Array:
        """The same, in the place of zeros ``(n, *shape)`` where that saves memory."""
        decoded = self.codec.decode_in(zeros, self.payload, self.blocks, self.turn)
        return self.blocks.mask(decoded)

    def rest(self, x: jax.Array) -> jax.Array:
        """What the payload does not say of ``x``: ``x - decode()``, padding zero."""
        rest = self.codec.rest(x, self.payload, self.blocks, self.turn)
        return self.blocks.mask(rest)


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """A computation that many conversations ask for at once, done once for all alike.

    Attributes:
      function: Works on each block on its own and keeps its shape; equal if it is the
        same one. Zeros behind the rows of a block must not change what becomes of the
        rows, so that blocks of unequal heights can share one program.
      x: Blocks ``(n, rows, ...)``.
    """

    function: Callable[[jax.Array], jax.Array]
    x: jax.Array


@dataclasses.dataclass(frozen=True)
class Codec:
    """Base of all codecs: the declared contract, and the one-message conversation.

    A codec for one message implements :meth:`encode` and :meth:`decode`. One that needs
    several rounds, like PowerSGD, implements :meth:`rounds` instead and asks through
    other codecs. One that leaves some leaves to another codec says so in
    :meth:`assign`. One that can do with less memory says how in :meth:`decode_in`,
    :meth:`rest` or :meth:`increment`. What must hold:

    * arrays of a payload have the block axis first, and each block decodes on its own;
    * padding is zero on entry and may decode to anything (it is masked for all);
    * ``decode`` depends on ``turn.step`` at most, never on ``turn.worker``;
    * payloads of a ``linear`` codec may be summed: the decoded mean is the mean of the
      decoded;
    * state has the block axis first as well, and comes out equal on all workers when
      it went in so: it may be computed from averages and shared randomness only.
    """

    linear: ClassVar[bool] = False
    unbiased: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    one_message: ClassVar[bool] = True  # has a single payload: no dialogue
    one_bit: ClassVar[bool] = False  # one sign a coordinate; a tied vote is a zero
    pointwise: ClassVar[bool] = False  # a coordinate is read without its neighbours
    exact: ClassVar[bool] = False  # loses nothing: joining leaves would only copy
    chooses: ClassVar[bool] = False  # speaks of some coordinates, and can tell which
    spans: ClassVar[bool] = False  # takes the shards behind a worker for one array
    block_size: ClassVar[int | None] = None  # None: whole leaves

    def assign(self, tree: Any) -> list["Codec"]:
        """The codec of every leaf of a tree of arrays."""
        return [self.for_shape(jnp.shape(x)) for x in jax.tree.leaves(tree)]

    def for_shape(self, shape: tuple[int, ...]) -> "Codec":
        """The codec of a leaf of this shape: this one, unless it would not pay."""
        del shape
        return self

    def of_shards(
        self,
        shape: tuple[int, ...],
        names: tuple[tuple[str, ...], ...],
        equal: tuple[str, ...],
    ) -> "Codec":
        """The codec of a leaf that is one behind a worker, if it :attr:`spans` shards.

        Args:
          shape: The leaf's global shape.
          names: The mesh axes over which each array axis is sharded.
          equal: Those behind the worker along which it is equal.
        """
        del shape, names, equal
        return self

    def state_axes(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Of the mesh axes that shard a leaf, those along which its state differs."""
        return names

    def members(self) -> tuple["Codec", ...]:
        """The codecs among which users' labels choose: itself, if there are none."""
        return (self,)

    def with_values(self, values: "Codec") -> "Codec":
        """This codec with its payload's values written by another codec."""
        del values
        raise TypeError(
            f"`compose({self}, ...)` makes no sense: its payload holds no values to "
            "compress again. Use a sparse or a low-rank compressor outside."
        )

    def keeps_no_residual(self) -> str | None:
        """Why a residual cannot be stored in its payloads, or ``None`` if it can.

        A reason in words, and the cure, for an error that names the codec before it.
        """
        return None

    def lane(self, size: int) -> tuple[int, Hashable] | None:
        """In what lanes a whole leaf may stand, beside others of other sizes.

        Of a codec that is written for ``efopt.codecs.lanes.Lanes``, the rows into
        which leaves are folded, and what those must have in common that share lanes.
        ``None``: leaves of one size alone share a batch.
        """
        del size
        return None

    def fills(self, block: tuple[int, ...]) -> bool:
        """Whether zeros may fill up leaves that are blocks of this shape.

        They then share a batch with larger ones. Of a codec that is written for
        ``efopt.codecs.padded.Padded``: a leaf is one block, in its own order; what is
        sent is that of the blocks as they are, and what it says of the zeros is zero.
        """
        del block
        return False

    def block_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The view ``(num_blocks, *block)`` in which a non-empty leaf is compressed."""
        size = math.prod(shape)
        if self.block_size is None:
            return (1, size)
        # A leaf below the block size gets a smaller one: little padding, few sizes.
        block = min(self.block_size, max(16, 4 ** (-(-(size - 1).bit_length() // 2))))
        return (-(-size // block), block)

    def flatten(self, x: jax.Array) -> jax.Array:
        """The coordinates of a leaf, in the order in which they are cut in blocks."""
        return x.reshape(-1)

    def unflatten(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Inverse of :meth:`flatten`."""
        return x.reshape(shape)

    def init(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """The state for a leaf, block axis first. Only asked of stateful codecs."""
        del shape, dtype
        return ()

    def encode(self, x: jax.Array, blocks: Blocks, turn: Turn) -> Payload:
        """Blocks ``(n, *block)`` in the compute dtype to a payload."""
        raise TypeError(f"`{self}` speaks in rounds, it has no single payload.")

    def decode(self, payload: Payload, blocks: Blocks, turn: Turn) -> jax.Array:
        """A payload to blocks ``(n, *block)`` in the compute dtype."""
        raise TypeError(f"`{self}` speaks in rounds, it has no single payload.")

    def decode_in(
        self, zeros: jax.Array, payload: Payload, blocks: Blocks, turn: Turn
    ) -> jax.Array:
        """:meth:`decode`, which may overwrite an array of zeros."""
        del zeros
        return self.decode(payload, blocks, turn)

    def told(
        self, payload: Payload, blocks: Blocks, turn: Turn
    ) -> tuple[jax.Array, jax.Array]:
        """The numbers that a payload has, zero elsewhere, and ones where it has one.

        Of a codec that :attr:`chooses`; ``decode`` is :meth:`unfold` of the first.
        """
        raise TypeError(f"`{self}` does not tell which coordinates it speaks of.")

    def unfold(self, x: jax.Array, blocks: Blocks) -> jax.Array:
        """What numbers as in :meth:`told` stand for: blocks ``(n, *block)``."""
        del blocks
        return x

    def rest(
        self, x: jax.Array, payload: Payload, blocks: Blocks, turn: Turn
    ) -> jax.Array:
        """``x - decode(payload)``, without decoding where there is a shorter way."""
        return x - self.decode(payload, blocks, turn)

    def increment(
        self,
        payload: Payload,
        x: jax.Array,
        recalled: float,
        ratio: jax.Array | None,
        blocks: Blocks,
        turn: Turn,
    ) -> Payload:
        """``payload + encode(x - recalled * decode(payload))``, of a linear codec.

        Args:
          payload: What was written before.
          x: Blocks ``(n, *block)``.
          recalled: The share of it that ``x`` contains.
          ratio: Factor on ``payload`` first, or ``None``.
          blocks: The blocks.
          turn: The same as when it was written.
        """
        wide = dataclasses.replace(blocks, dtype=blocks.compute_dtype)
        again = blocks.mask(self.decode(payload, blocks, turn))
        again = self.encode(again, wide, turn)

        def add(old, again, new):
            rest = old.astype(new.dtype) - again * recalled
            rest = rest if ratio is None else rest * ratio.astype(rest.dtype)
            return bits.cast(rest + new, old.dtype)

        fresh = self.encode(x, wide, turn)
        return jax.tree.map(add, payload, again, fresh)

    def rounds(self, x: jax.Array, blocks: Blocks, state: Any, turn: Turn) -> Rounds:
        """The conversation about ``x``, blocks ``(n, *block)``.

        Yields messages; is sent a message of the mean over workers of each; returns
        (that of ``x``, what this worker's own do not say of ``x``, new state). May
        yield a :class:`Batch` in between; is sent its result.
        """
        message = self.write(x, blocks, turn)
        mean = yield message
        return mean, message.rest(x), state

    def write(self, x: jax.Array, blocks: Blocks, turn: Turn) -> Message:
        """The message about ``x``; a large one's payload is computed once."""
        return Message(self, self.encode(x, blocks, turn), blocks, turn).once()

    def delta(self, shape: tuple[int, ...]) -> float | None:
        """Contraction factor for a leaf: ``E|C(x) - x|^2 <= (1 - delta) |x|^2``."""
        del shape
        return None

    def omega(self, shape: tuple[int, ...]) -> float | None:
        """Variance factor for a leaf: ``E C(x) = x, E|C(x) - x|^2 <= omega |x|^2``."""
        del shape
        return None
