"""Majority vote: signs to the owners of ranges, and the sign of their sum back."""

import dataclasses
from typing import ClassVar

from efopt.exchanges.exchange import Exchange
from efopt.exchanges.two_phase import TwoPhase


@dataclasses.dataclass(frozen=True, repr=False)
class MajorityVote(TwoPhase):
    """Two phases of signs, in which owners count and forget."""

    name: ClassVar[str] = "majority_vote"
    keeps: ClassVar[bool] = False
    pays_average: ClassVar[bool] = True

    def refusal(self, codec):
        if not codec.one_bit:
            return "a vote counts plain signs; use `efopt.sign()`"
        return super().refusal(codec)


def majority_vote() -> Exchange:
    """Every worker sends signs and receives the sign of their sum: one bit each way.

    A tie, which an even number of workers allows, is a zero, and what
    :func:`efopt.sign` does with zeros decides it: a fair coin of the owner, which falls
    the other way at every second step. Negated gradients give the negated vote in the
    mean, however many workers there are, and a coordinate without any gradient does not
    drift. What a worker has paid is the vote, not its own sign, so error feedback
    around it stays conservative. For :func:`efopt.sign`; ``efopt.sign(zero=
    "positive")`` counts zeros and ties as +1.

    Returns:
      An :class:`efopt.exchanges.Exchange`.

    Examples:
      >>> import efopt
      >>> tx = efopt.compress(
      ...     efopt.sign(), axis_name="data",
      ...     exchange=efopt.exchanges.majority_vote())

    References:
      Bernstein et al, `signSGD with Majority Vote is Communication Efficient And Fault
      Tolerant <https://arxiv.org/abs/1810.05291>`_, 2018 (Algorithm 1)
    """
    return MajorityVote()
