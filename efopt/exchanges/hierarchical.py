"""Two levels: averaged as it is where that is fast, compressed over the rest."""

import dataclasses

from efopt.exchanges import table
from efopt.exchanges.exchange import Exchange
from efopt.ground.checks import keyword_only
from efopt.workers.axes import Axes, AxisName


@dataclasses.dataclass(frozen=True, repr=False)
class Hierarchical(Exchange):
    """The mean over the fast axes, scattered; its parts meet over the slow ones.

    Attributes:
      fast_axes: As of every exchange.
      exchange: The exchange over the others; ``None``: as suits a leaf's codec.
    """

    fast_axes: tuple[str, ...]  # type: ignore[misc]
    exchange: Exchange | None = None

    name = "hierarchical"

    def __repr__(self):
        return f"hierarchical({Axes(self.fast_axes).key!r}, exchange={self.exchange!r})"

    @property
    def keeps(self) -> bool:  # type: ignore[override]
        return self.exchange is not None and self.exchange.keeps

    @property
    def pays_average(self) -> bool:  # type: ignore[override]
        return self.exchange is not None and self.exchange.pays_average

    def refusal(self, codec):
        return None if self.exchange is None else self.exchange.refusal(codec)

    def meet(self, messages, axes, server):
        way = self.exchange or table.default(messages[0].codec)
        return way.meet(messages, axes, server)


@keyword_only
def hierarchical(fast: AxisName, *, exchange: Exchange | str | None = None) -> Exchange:
    """Two levels for replicated parameters: exact over a fast axis, compressed beyond.

    For devices that all hold the parameters and each take their own gradient, several
    of which share one network card or one slice: ``axis_name=("dcn", "fast")``. The
    mean over ``fast`` is taken as it is and scattered, so that each of ``m`` devices
    holds one part of it; this part is compressed, and meets those of the other groups
    by ``exchange``; the parts of the average are gathered over ``fast``. What crosses
    the slow axis is ``1 / m`` of what each device would send without, and so is what a
    device keeps of residuals: along the first array axis that ``m`` divides. A leaf
    without one, and one of which the compressor speaks in several rounds, as
    PowerSGD does of matrices, is averaged whole over ``fast`` and kept whole.

    The state must be placed by :func:`efopt.distribute`, for a step over global arrays
    (:func:`efopt.value_and_grad` over all axes), or one mapped over all of them by
    ``jax.shard_map``; ``pmap`` and ``vmap`` have no mesh. State in front of it that is
    each worker's own, such as momentum by :func:`efopt.per_worker`, is that of each
    device, over all axes. Parameters that are sharded over the fast axis need none of
    this: their gradients come averaged there; leave it out of ``axis_name``.

    Args:
      fast: The axis, or axes, among those of ``axis_name``, over which updates are
        averaged as they are.
      exchange: The exchange over the others, or its name; ``None``: as suits a leaf's
        compressor.

    Returns:
      An :class:`efopt.exchanges.Exchange`.

    Raises:
      TypeError: If ``fast`` is neither a string nor a tuple of strings.
      ValueError: If it names an axis twice, or ``exchange`` is unknown or of two levels
        itself.

    Examples:
      >>> import efopt
      >>> tx = efopt.error_feedback(
      ...     efopt.scaled_sign(1024), axis_name=("dcn", "fast"),
      ...     exchange=efopt.exchanges.hierarchical("fast", exchange="two_phase"))
    """
    way = table.read("hierarchical", exchange)
    if way is not None and way.fast_axes:
        raise ValueError(
            f"`hierarchical(exchange=...)` must be of one level, got {way!r}: name all "
            "fast axes at once, as a tuple."
        )
    return Hierarchical(Axes.of("hierarchical", fast, option="fast").names, way)
