"""Everything here is in float64, which JAX has for a whole process or not at all.

A plain `pytest` leaves this folder out (`norecursedirs` in pyproject.toml), and
`tests/test_float64.py` runs it in a process of its own.
"""

import jax

jax.config.update("jax_enable_x64", True)
