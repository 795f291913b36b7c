"""What would help where a plan does not, and what to know about a compiler."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from efopt.codecs.compressor import Compressor, make
from efopt.compressors.cast import cast
from efopt.compressors.power_sgd import power_sgd
from efopt.compressors.scaled_sign import scaled_sign
from efopt.exchanges.table import EXCHANGES
from efopt.hlo.networks import duration
from efopt.hlo.tpu import FEWEST_DEVICES, tpu_compiler_options
from efopt.wire.plan_report import Plan
from efopt.wire.target import Target

_Option = tuple[Compressor, str | None]
_OTHERS: tuple[_Option, ...] = (
    (scaled_sign(block_size=1024), "two_phase"),
    (power_sgd(rank=4), None),
    (cast("bfloat16"), None),
)


def advise(plan: Plan, compressor: Compressor, tree: Any, target: Target) -> list[str]:
    """Lines of advice on a plan for a tree of structs."""
    if not plan.helps and plan.num_workers > 1 and plan.dense.operand_bytes:
        lines = list(_better(plan, compressor, tree, target))
    else:
        lines = list(_shorter(plan))
    return [*lines, *_compiler(plan, target)]


def _shorter(plan: Plan) -> Iterator[str]:
    narrow = dataclasses.replace(plan, report=plan.dense_bfloat16, compress_seconds=0.0)
    if plan.helps and _cost(narrow) < _cost(plan):
        yield "But dense bfloat16 is better still."


def _better(
    plan: Plan, compressor: Compressor, tree: Any, target: Target
) -> Iterator[str]:
    """The best way that helps, of the same compressor if there is one."""
    for options in (_ways(compressor), _OTHERS):
        found = []
        for other, exchange in options:
            try:
                report = target.report(other, tree, exchange)
            except ValueError:  # this exchange or this tree is not for it
                continue
            changed = dataclasses.replace(plan, report=report)
            if changed.helps:
                found.append((_cost(changed), repr(other), exchange, changed))
        if found:
            _, name, exchange, changed = min(found, key=lambda f: f[0])
            by = f' with exchange="{exchange}"' if exchange else ""
            time = f", {duration(changed.exchange_seconds)}"
            timed = time if plan.network.bandwidth is not None else ""
            what = f"bytes over {', '.join(plan.slow)}" if plan.slow else "link bytes"
            yield (
                f"This would: {name}{by}, {changed.bytes_per_device:,} {what}{timed}."
            )
            return
    yield f"Nor would anything else that was tried: stay with dense {plan.baseline}."


def _ways(compressor: Compressor) -> Iterator[_Option]:
    """The compressor by every exchange, also in blocks if it can be cut into some."""
    codec = compressor.codec
    cut = "block_size" in {f.name for f in dataclasses.fields(codec)}
    for exchange in EXCHANGES:
        yield compressor, exchange
        if cut and codec.block_size is None:
            yield make(dataclasses.replace(codec, block_size=1024)), exchange  # type: ignore


def _cost(plan: Plan) -> float:
    timed = plan.network.bandwidth is not None
    return plan.step_seconds if timed else plan.bytes_per_card


def _compiler(plan: Plan, target: Target) -> Iterator[str]:
    if target.place is not None:
        # Pieces are gathered over all devices of a slice, which is behind a worker.
        slow = set(target.place.axes.names)
        inner = [c for c in plan.report.collectives if not slow & set(c.axes or ())]
        gathers = any(c.operation == "all-gather" for c in inner)
        behind = target.place.mesh.size // target.place.num_workers
        if target.platform == "tpu" and gathers and behind >= FEWEST_DEVICES:
            yield (
                f"On a slice of {behind} devices a TPU's compiler may double the bytes "
                "of the all-gathers inside it; see "
                "`efopt.wire.tpu_compiler_options(topology)`."
            )
        return
    operations = {c.operation for c in plan.report.collectives}
    replaced = any(c.instead_of for c in plan.report.collectives)
    if target.platform == "tpu" and target.topology is None:
        if "all-gather" in operations:
            yield (
                "A TPU's compiler may double the bytes of the all-gather: with "
                "`topology=` this is planned."
            )
    elif replaced and tpu_compiler_options(str(target.topology)):
        yield (
            "`jax.jit(step, compiler_options=efopt.wire.tpu_compiler_options("
            f'"{target.topology}"))` keeps the all-gather.'
        )
    elif replaced:
        yield (
            f"No compiler option is known that keeps the all-gather on "
            f"{target.topology}; one over a part of the slice is kept."
        )
