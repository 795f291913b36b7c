"""An exchange of two levels, written by a third party: one file, one row in EXCHANGES.

Workers that share a fast link average as they are; compressed is what goes over the
slow one between their groups.
"""

import dataclasses
from typing import Any, ClassVar

import efopt
from efopt.exchanges import Exchange, all_gather
from efopt.workers.axes import Axes


@dataclasses.dataclass(frozen=True)
class TwoLevel(Exchange):
    """Dense over one axis of the workers, and by another exchange over the rest.

    Attributes:
      fast: The name of the axis with the fast link.
      slow: The exchange over all other axes.
    """

    name: ClassVar[str] = "two_level"
    fast: str
    slow: Exchange = dataclasses.field(default_factory=all_gather)

    @property
    def keeps(self) -> bool:
        return self.slow.keeps

    @property
    def pays_average(self) -> bool:
        return self.slow.pays_average

    def refusal(self, codec: Any) -> str | None:
        return self.slow.refusal(codec)

    def settled(self, codecs: Any) -> "TwoLevel":
        return dataclasses.replace(self, slow=self.slow.settled(codecs))

    def level(self, axes: Axes) -> Axes:
        return Axes(tuple(name for name in axes.names if name != self.fast))

    def enter(self, x: Any, axes: Axes) -> Any:
        # The mean over a group: from here on its members say the same.
        return Axes((self.fast,)).pmean(x)

    def meet(self, messages: Any, axes: Axes, server: Any) -> Any:
        return self.slow.meet(messages, axes, server)


def two_level(fast: str, slow: Exchange | None = None) -> efopt.exchanges.Exchange:
    """Averages densely over ``fast``, then compressed over the other axes.

    A worker owes what its group's message did not say: the group's residuals are equal.

    Args:
      fast: One name of ``axis_name=("slow", "fast")``.
      slow: The exchange over the other axes; all-gather by default.
    """
    return TwoLevel(fast, slow or all_gather())
