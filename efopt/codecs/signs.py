"""Signs, one bit each, with a fair and shared answer to zero.

One bit cannot say zero. Were zero always positive, a coordinate without gradient would
drift by a step at every step, and so would a vote that ends in a tie. Here the sign of
a zero is a coin that

* is turned over at every second step, so that two steps in a row take each other back;
* is opposite on each two neighbours among the workers, so that their zeros take each
  other back in the average and leave the decision to those who have something to say;
* is known to all who know step, worker and place: a hash, nothing is kept or sent.
"""

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.blocks import Blocks, Turn
from efopt.ground import bits
from efopt.ground.randomness import hash_words

COIN = 0x2545F491  # tells the coins from all other random numbers of a step


def fair_signs(x: jax.Array, blocks: Blocks, turn: Turn) -> jax.Array:
    """Packed signs of ``(n, size)``, set where positive; zeros toss a coin.

    The signs of ``-x`` are the opposite of those of ``x`` wherever ``x`` is not zero,
    and those of zeros at steps ``2 k`` and ``2 k + 1`` are the opposite of each other.
    """
    positive = bits.pack_tests(x, lambda lane: lane > 0)
    zero = bits.pack_tests(x, lambda lane: lane == 0)
    return positive | (zero & _coins(blocks, turn))


def signed(packed: jax.Array, scale: jax.Array, blocks: Blocks) -> jax.Array:
    """Magnitudes, against ``(n, size)``, with the signs of :func:`fair_signs`."""
    return jnp.where(bits.unpack_bits(packed, blocks.size), scale, -scale)


def _coins(blocks: Blocks, turn: Turn) -> jax.Array:
    """A fair bit for every sign, packed alike: uint8 ``(n, ceil(size / 8))``."""
    one = np.uint32(1)
    pair, step = turn.worker >> one, turn.step >> one
    key = hash_words(np.uint32(COIN ^ turn.stream), step, pair, blocks.index)
    packed = blocks.runs([-(-size // 8) for size in blocks.members])
    word = hash_words(packed.of(key), packed.place())
    # All ones where the coin is turned over.
    over = jnp.uint32(0) - ((turn.worker ^ turn.step) & one)
    return (word ^ over).astype(jnp.uint8)
