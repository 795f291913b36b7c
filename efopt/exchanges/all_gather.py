"""All-gather: every worker receives every payload and averages what it decodes."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from efopt.codecs.codec import Message
from efopt.compressors.identity import plain
from efopt.exchanges import carrier
from efopt.exchanges.exchange import Exchange, decode_mean
from efopt.ground import checks
from efopt.workers.axes import zeros_like


@dataclasses.dataclass(frozen=True, repr=False)
class AllGather(Exchange):
    """One ``all_gather`` of the packed payloads of all leaves.

    Attributes:
      senders: Whether a coordinate is averaged over those who sent it alone.
    """

    senders: bool = False
    name: ClassVar[str] = "all_gather"

    def __repr__(self):
        return f"all_gather({'senders=True' if self.senders else ''})"

    def refusal(self, codec):
        if not self.senders or codec.chooses:
            return None
        return (
            "it does not tell which coordinates each worker speaks of, so that there "
            "is no mean over those who do; use `all_gather()`"
        )

    def meet(self, messages, axes, server):
        payloads = [m.payload for m in messages]
        carriers = axes.all_gather(carrier.pack(payloads, 1)[0])
        read = _mean_of_senders if self.senders else decode_mean
        pairs = zip(messages, read(carriers, messages), strict=True)
        return [plain(mean, m.blocks, m.turn) for m, mean in pairs], server


@checks.keyword_only
def all_gather(*, senders: bool = False) -> Exchange:
    """All-gather of payloads, which every worker decodes and averages.

    Carries every compressor. ``b`` bytes of payload are ``(n - 1) b`` link bytes a
    worker: for a few workers, or for payloads far smaller than the leaf. The default of
    compressors that are not linear.

    With ``senders=True`` each coordinate is averaged over the workers that have sent
    it, not over all, as in the released codes of DeMo and SparseLoCo: the same bytes,
    since every worker has everybody's payload. For compressors that choose coordinates
    (``top_k``, ``threshold``, ``dct_top_k`` and their compositions). What comes out is
    then no mean of what the workers have said: it is up to ``n`` times as long, most so
    where workers choose differently, and what is applied and what is owed no longer add
    up to what came in.

    Args:
      senders: Whether each coordinate is averaged over those who sent it alone. Static.

    Returns:
      An :class:`efopt.exchanges.Exchange`.

    Raises:
      TypeError: If ``senders`` is no Python bool.

    Examples:
      >>> import efopt
      >>> tx = efopt.error_feedback(
      ...     efopt.scaled_sign(), axis_name="data",
      ...     exchange=efopt.exchanges.all_gather())
    """
    return AllGather(checks.static_bool("all_gather", "senders", senders))


def _mean_of_senders(
    carriers: jax.Array, messages: Sequence[Message]
) -> list[jax.Array]:
    """As ``decode_mean``, of each number over the workers that have sent it."""
    like = [m.payload for m in messages]

    def told(i):
        row = lax.dynamic_index_in_dim(carriers, i, keepdims=True)
        pairs = zip(messages, carrier.unpack(row, like, 1), strict=True)
        return [m.codec.told(p, m.blocks, m.turn) for m, p in pairs]

    def add(i, total):
        return jax.tree.map(jnp.add, total, told(i))

    start = jax.tree.map(zeros_like, jax.eval_shape(told, jnp.int32(0)))
    sums = lax.fori_loop(0, carriers.shape[0], add, start)
    means = [x / jnp.maximum(marks, 1) for x, marks in sums]
    pairs = zip(messages, means, strict=True)
    return [m.blocks.mask(m.codec.unfold(x, m.blocks)) for m, x in pairs]
