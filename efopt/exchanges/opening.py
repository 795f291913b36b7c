"""How a scheme opens its link: the options that all of them share, checked."""

import zlib
from typing import Any

from efopt.codecs.compressor import Compressor
from efopt.exchanges import in_flight, table
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.link import Link
from efopt.ground import checks
from efopt.workers.axes import Axes


@checks.keyword_only
def open_link(
    api: str,
    compressor: Any,
    *,
    axis_name: Any = None,
    exchange: Any = None,
    start: int = 0,
    delay: int = 0,
    role: str = "",
) -> Link:
    """Checks the options that every scheme around a compressor shares.

    Args:
      api: The name of the scheme, for errors.
      compressor: An :class:`efopt.Compressor`.
      axis_name: The mapped axis of the workers, a tuple of axes, or ``None``.
      exchange: An :class:`efopt.exchanges.Exchange`, the name of one, or ``None``.
      start: Steps that are averaged uncompressed first.
      delay: Steps that a payload waits before it is exchanged, 0 or 1.
      role: Names what it is used for where a chain may hold several: two roles never
        draw the same random numbers.

    Returns:
      A :class:`Link`.

    Raises:
      TypeError: If ``compressor``, ``axis_name``, ``exchange`` or ``start`` is not what
        it must be.
      ValueError: If the exchange is unknown, needs an axis or cannot carry the
        compressor.

    Examples:
      >>> import jax.numpy as jnp
      >>> import efopt
      >>> link = efopt.exchanges.open_link("mine", efopt.top_k(k=1))
      >>> x = jnp.array([3.0, 1.0])
      >>> mean, lost, _ = link.average(x, link.init(x), jnp.int32(0))
      >>> print(mean, lost)
      [3. 0.] [0. 1.]
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"`{api}(compressor)` takes an `efopt.Compressor`, such as "
            f"`efopt.scaled_sign()`; got {compressor!r}."
        )
    axes = Axes.maybe(api, axis_name)
    checks.static_int(api, "start", start, least=0)
    way = table.read(api, exchange)
    if axes is None and way is not None:
        raise ValueError(
            f"`{api}(exchange={exchange!r})` needs `axis_name`: with "
            "`axis_name=None` there is one worker and nobody to meet."
        )
    if way is not None:
        reasons = [way.refusal(member) for member in compressor.codec.members()]
        if None not in reasons:
            raise ValueError(
                f"`{api}({compressor!r}, exchange={exchange!r})` cannot work: "
                f"{reasons[0]}."
            )
    stream = zlib.crc32(role.encode()) if role else 0
    delay = in_flight.check_delay(api, delay, compressor, start)
    label, workers = f"`{api}({compressor!r})`", axes
    if way is not None and way.fast_axes:
        axes, way = _levels(api, axes, way)
    return Link(label, compressor.codec, way, axes, start, stream, delay, workers)


def _levels(api: str, axes: Any, way: Any) -> tuple[Axes, Exchange | None]:
    """The slow axes of an exchange of two levels, and the exchange over them."""
    slow = tuple(name for name in axes.names if name not in way.fast_axes)
    if len(slow) + len(way.fast_axes) != len(axes.names) or not slow:
        raise ValueError(
            f"`{api}(axis_name={axes.key!r}, exchange={way!r})` needs the fast axes "
            "among those of the workers, and at least one that is slow, such as "
            '`axis_name=("dcn", "fast")`.'
        )
    return Axes(slow), way.exchange
