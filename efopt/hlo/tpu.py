"""What is known of the TPU compiler's way with an all-gather.

Compiled ahead of time with libtpu 0.0.42.1: an all-gather over *all* devices of a slice
of 64 devices or more becomes the all-reduce of a zero-padded buffer. On a v5e or v6e
that happens to results of up to 16 MiB, on a v4 or v5p at every size tried (up to 512
MiB). Order of the devices makes no difference. An all-gather of rows, as exchanges send
them, over a part of the devices is left alone, and so is every all-to-all; one of a
flat array is only where a device's part is of whole lanes of 128 words. Some programs
escape: signs without scales of 16 M coordinates did, in two phases. So what is planned
here is the worst, and :func:`efopt.hlo.measure` tells for the program at hand.

Between slices rows of uint32 travel as they are, and what is summed in float32 in whole
tiles of 1024 elements, or of 128, 256 or 512 where one alone has no more.
"""

import math
import re
from dataclasses import replace

from efopt.hlo import algorithms
from efopt.hlo.report import Collective

# Generation: devices a chip, and the largest result in bytes that is replaced.
_GENERATIONS = {
    "v4": (2, math.inf),
    "v5e": (1, 2**24),
    "v5p": (1, math.inf),
    "v6e": (1, 2**24),
}
FEWEST_DEVICES = 64
_PREFER = {"xla_tpu_prefer_async_allgather_to_allreduce": "true"}
_OPTIONS = {"v4": _PREFER | {"xla_enable_async_all_gather": "true"}, "v5e": _PREFER}


def tpu_compiler_options(topology: str) -> dict[str, str]:
    """Compiler options that keep an all-gather an all-gather on a TPU.

    On slices of 64 devices and more the TPU compiler replaces many all-gathers by the
    all-reduce of a zero-padded buffer, which sends twice the bytes; :func:`measure`
    shows it. Pass these to ``jax.jit(step, compiler_options=...)``.

    Args:
      topology: Generation and shape of the slice, such as ``"v5e:8x8"``.

    Returns:
      The options; empty for a slice on which nothing is replaced, and on v5p and v6e,
      where no option is known that prevents it.

    Raises:
      ValueError: If it is no topology, or of a generation that has not been tried.

    Examples:
      >>> from efopt.wire import tpu_compiler_options
      >>> tpu_compiler_options("v5e:8x8")
      {'xla_tpu_prefer_async_allgather_to_allreduce': 'true'}
      >>> tpu_compiler_options("v5e:2x4")
      {}
    """
    generation, devices = parse(topology, "tpu_compiler_options(topology)")
    return dict(_OPTIONS.get(generation, {})) if devices >= FEWEST_DEVICES else {}


def parse(topology: str, api: str) -> tuple[str, int]:
    """Generation of a topology, and its number of devices."""
    found = None
    if isinstance(topology, str):
        found = re.fullmatch(r"(v\d+\w?):(\d+(?:x\d+)+)", topology)
    if not found or found[1] not in _GENERATIONS:
        raise ValueError(
            f"`{api}` must be a TPU generation ({', '.join(_GENERATIONS)}) and the "
            f'shape of a slice, such as "v5e:8x8"; got {topology!r}.'
        )
    per_chip, _ = _GENERATIONS[found[1]]
    return found[1], per_chip * math.prod(map(int, found[2].split("x")))


def compiled(c: Collective, topology: str) -> Collective:
    """What the compiler makes of a collective."""
    generation, devices = parse(topology, "plan(topology=...)")
    _, largest = _GENERATIONS[generation]
    result = c.operand_bytes * c.group_size
    everybody = c.group_size == devices >= FEWEST_DEVICES
    if c.operation != "all-gather" or not everybody or result > largest:
        return c
    return replace(
        c,
        operation="all-reduce",
        operand_bytes=result,
        shapes=tuple((c.group_size, *shape) for shape in c.shapes),
        link_bytes=algorithms.link_bytes("all-reduce", result, c.group_size),
        instead_of="all-gather",
    )


def tiled(c: Collective) -> Collective:
    """What travels between slices of a collective."""
    if c.operation != "all-reduce" or set(c.element_types) != {"f32"}:
        return c
    given = 4 * sum(_tiles(math.prod(x), len(c.shapes) == 1) for x in c.shapes)
    sent = algorithms.link_bytes(c.operation, given, c.group_size)
    return replace(c, operand_bytes=given, link_bytes=sent)


def _tiles(size: int, alone: bool) -> int:
    """Elements of an array in whole tiles."""
    tile = next((t for t in (128, 256, 512) if alone and size <= t), 1024)
    return -(-size // tile) * tile
