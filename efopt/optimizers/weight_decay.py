"""Weight decay, added to whatever stands in front of it."""

from typing import Any

import optax

Mask = Any  # a tree of booleans, or a function from parameters to one


def add_decay(strength: Any, mask: Mask | None) -> optax.GradientTransformation:
    """Adds ``strength`` times the parameters; asks for none of them at a plain zero."""
    if isinstance(strength, int | float) and strength == 0:
        return optax.identity()  # stateless, as what it stands for
    return optax.add_decayed_weights(strength, mask)
