"""Steps that each worker takes by its own momentum, until all meet."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efopt.exchanges.link import Link
from efopt.feedback.momenta import alive, mixed
from efopt.workers.local import LocalState


class LocalMomentumState(NamedTuple):
    """What is kept between meetings.

    Attributes:
      own: Each worker's drift from the common parameters and, as ``inner``, its
        momentum. A :class:`efopt.PerWorker` if there is an axis.
      elapsed: The sum of the learning rates since the last meeting. shape=(). Equal on
        all workers.
    """

    own: Any
    elapsed: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class LocalMomentum:
    """Steps along the own momentum over a variance that all know (2202.06009).

    The buffer that the paper calls u, the sum of rates times momenta, is minus the
    drift times the root of the variance: one array serves for both.

    Attributes:
      meets_at: Whether at a step all meet.
      b1: Decay of the momentum.
      eps: Added to the variance's root.
    """

    meets_at: Callable[[jax.Array], jax.Array]
    b1: Any
    eps: Any

    def refuse(self, link: Link, exchange: Any) -> None:
        """Raises if an exchange wants the updates of every step."""
        if link.fast:
            raise ValueError(
                f"{link.api} takes steps of each worker's own between meetings, and "
                f"{exchange!r} averages over {link.fast!r} at every step. Give it the "
                "inner exchange, over the slow axis, and average over the fast one in "
                "front: `optax.chain(efopt.compress(efopt.compressors.identity(), "
                f"axis_name={link.fast[0]!r}), ...)`."
            )

    def init(self, link: Link, zeros: Any) -> LocalMomentumState:
        """Before the first step."""
        own = link.wrap(LocalState(zeros, zeros), rule="mean")
        return LocalMomentumState(own, jnp.zeros([], jnp.float32))

    def walk(self, own: LocalState, grads: Any, nu: Any, rate: jax.Array) -> LocalState:
        """One worker after a step of its own, at this rate."""
        # 2202.06009 Algorithm 1, lines 3 to 5
        mu = alive(mixed(self.b1, own.inner, grads), nu)
        step = lambda d, m, v: d - rate.astype(d.dtype) * m / self._root(v)  # noqa: E731
        return LocalState(jax.tree.map(step, own.drift, mu, nu), mu)

    def mean(self, own: LocalState, nu: Any, total: jax.Array) -> Any:
        """Of its momenta since the last meeting, weighted by their rates.

        Args:
          own: One worker's state.
          nu: The variance.
          total: The sum of these rates; of zero nothing comes.
        """
        # u / sum of rates, which line 8 takes of the average: it is all the same
        share = jnp.where(total == 0, 0, 1 / jnp.where(total == 0, 1, total))
        one = lambda d, v: -d * self._root(v) * share.astype(d.dtype)  # noqa: E731
        return jax.tree.map(one, own.drift, nu)

    def met(self, own: LocalState, mu: Any, meets: jax.Array) -> LocalState:
        """One worker where all have met, with the common momentum; or as it is."""
        # lines 8 to 10
        drift = jax.tree.map(lambda d: jnp.where(meets, 0, d), own.drift)
        inner = jax.tree.map(lambda m, c: jnp.where(meets, c, m), own.inner, mu)
        return LocalState(drift, inner)

    def _root(self, v: jax.Array) -> jax.Array:
        return jnp.sqrt(v) + self.eps
