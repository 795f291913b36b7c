"""What a configuration will send and whether it will pay, before training."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efopt.codecs.codec import Codec
from efopt.codecs.compressor import Compressor, make
from efopt.compressors.partition import partition
from efopt.exchanges.exchange import Exchange
from efopt.exchanges.hierarchical import hierarchical
from efopt.exchanges.link import Link
from efopt.exchanges.opening import open_link
from efopt.ground.checks import keyword_only
from efopt.ground.dtypes import check_float
from efopt.hlo.networks import MeshNetworks, Network
from efopt.hlo.report import WireReport
from efopt.wire.advice import advise
from efopt.wire.place import Place
from efopt.wire.plan_report import LeafPlan, Plan
from efopt.wire.rounds import Rounds
from efopt.wire.target import Target
from efopt.wire.trace import AXIS
from efopt.workers.fragments import Fragments
from efopt.workers.fragments import read as read_fragments


@keyword_only
def plan(
    compressor: Compressor,
    params: Any,
    *,
    num_workers: int | None = None,
    exchange: Exchange | str | None = None,
    bandwidth: float | None = None,
    latency: float = 0.0,
    compute_seconds: float = 0.0,
    compress_seconds: float = 0.0,
    platform: str | None = None,
    topology: str | None = None,
    mesh: Any = None,
    axis_name: Any = None,
    params_specs: Any = None,
    networks: Mapping[str, Network] | None = None,
    devices_per_card: Mapping[str, int] | None = None,
    every: int | None = None,
    fragments: Any = None,
) -> Plan:
    """Says from shapes alone what a configuration sends in a step, and if that pays.

    The exchange is traced with abstract values, so payloads, carriers and padding are
    those of the real one; nothing is compiled or run. Sizes are per worker, by the
    algorithms that :mod:`efopt.wire` lists. The predicted time of an exchange is the
    sum over its collectives of

    ``messages * latency + link_bytes * 8 / bandwidth``

    and a step is computation, compression and exchange one after the other: a link that
    sends and receives at once, nothing overlapped, and none of the time that the
    software of the network takes to copy and to sum.

    With ``mesh`` the workers stand along ``axis_name``, each of them many devices, and
    sizes are per device: what is sharded over the other axes is compressed by shard,
    what is equal on them is sent in pieces, one a device, and gathered on the fast
    axes. The plan compares what crosses the slow axis with a dense step on the same
    mesh, and ``plan.report.over(axis)`` has what crosses any.

    Args:
      compressor: An :class:`efopt.Compressor`.
      params: The tree of parameters: arrays or :class:`jax.ShapeDtypeStruct`.
      num_workers: Number of workers, at least 1, on a flat axis. Not with ``mesh``.
      exchange: As for :func:`efopt.error_feedback`; ``None`` for the compressor's own.
      bandwidth: Bits a second that one worker can send: ``1e9`` for 1 Gbit/s. With
        ``mesh`` see ``networks``.
      latency: Seconds that a message takes beside its bytes.
      compute_seconds: Computation of a step without any exchange.
      compress_seconds: What compressing adds to it.
      platform: ``"cpu"``, where sums of bfloat16 travel as float32, ``"gpu"`` or
        ``"tpu"``, where on a mesh the workers are slices, between which sums travel in
        tiles of 4 KiB; ``None`` for what the program asks for.
      topology: Of a TPU, such as ``"v5e:8x8"``: where the compiler is known to replace
        all-gathers (see :func:`tpu_compiler_options`), they are planned so, although
        some programs escape.
      mesh: Sizes by axis, the outermost first, such as ``{"dcn": 4, "fsdp": 64}``, or a
        mesh of JAX; no devices are needed.
      axis_name: With ``mesh``: the axis of the workers, or a tuple of axes, as for
        :func:`efopt.error_feedback`. The slow axis is this one, or those of them over
        which the exchange compresses; several count as one.
      params_specs: With ``mesh``: how parameters are sharded, as for
        :func:`efopt.distribute`: a tree of ``PartitionSpec`` like ``params``, or one
        for all leaves. ``None``: as the leaves are placed on a mesh of these axes, or
        replicated.
      networks: With ``mesh``: a :class:`Network` by axis. That of the slow axis is of
        one network card: its ``bandwidth`` is in bits a second that a card can send.
        Others are of one device. An axis without one takes no time.
      devices_per_card: With ``mesh``: by slow axis, how many devices share a network
        card; 1 if not given.
      every: With :func:`efopt.local_steps`: the steps of a round. ``plan.rounds`` then
        has the bytes of a step in the mean and at most, the time of a round, and from
        which length of a round on the link is not the bottleneck; all else is of one
        meeting, and ``compress_seconds`` of a round.
      fragments: With ``every``: as for :func:`efopt.local_steps`.

    Returns:
      A :class:`Plan`. Printed, it is a table and a verdict.

    Raises:
      TypeError: If ``compressor`` is not one, a leaf is not floating-point, or ``mesh``
        or an entry of ``networks`` is none.
      ValueError: If a number is out of range, the exchange is unknown or cannot carry
        the compressor, or the platform or topology is unknown; if both or neither of
        ``num_workers`` and ``mesh`` are given, or an option that goes with the other;
        if axes or specs do not fit the mesh or the parameters.

    Examples:
      >>> import jax
      >>> import efopt
      >>> params = {"w": jax.ShapeDtypeStruct((1000, 1000), "float32")}
      >>> p = efopt.wire.plan(efopt.scaled_sign(), params, num_workers=8, bandwidth=1e9)
      >>> p.payload_bits, p.bytes_sent_per_worker
      (1000032, 875028)
      >>> print(p.verdict)
      A step is 8.0 times as fast as dense float32. It pays on any link, if compressing
      takes no time.

      Four slices of 50 devices, whose hosts of 10 have one network card each:

      >>> p = efopt.wire.plan(
      ...     efopt.compressors.scaled_sign(1000), params, exchange="two_phase",
      ...     mesh={"dcn": 4, "fsdp": 50}, axis_name="dcn",
      ...     params_specs=jax.sharding.PartitionSpec("fsdp"),
      ...     networks={"dcn": efopt.wire.Network(bandwidth=1e11)},
      ...     devices_per_card={"dcn": 10})
      >>> p.bytes_per_device, p.bytes_per_card, p.report.bytes_over("fsdp").link
      (3888, 38880, 0)
      >>> p.dense.bytes_over("dcn").link
      120000
    """
    _check_numbers(bandwidth, latency, compute_seconds, compress_seconds)
    tree = _structs(params)
    place: Place | None = None
    if mesh is None:
        flat = {
            "axis_name": axis_name,
            "params_specs": params_specs,
            "networks": networks,
        }
        _check_flat(num_workers, {**flat, "devices_per_card": devices_per_card})
        link = open_link("plan", compressor, axis_name=AXIS, exchange=exchange)
        measure: Network | MeshNetworks = Network(bandwidth, latency)
    else:
        _check_no_flat(num_workers, bandwidth, latency)
        place = Place.read(mesh, axis_name, params_specs, params)
        link = open_link("plan", compressor, axis_name=axis_name, exchange=exchange)
        slow = _slow_axes(link, tree)
        num_workers = place.num_workers
        measure = _mesh_networks(place, slow, networks or {}, devices_per_card or {})
    assert num_workers is not None
    target = Target(num_workers, platform, topology, place)
    target.check()
    report = target.report(compressor, tree, exchange)
    leaves = jax.tree.leaves(tree)
    narrow = leaves and all(x.dtype.itemsize <= 2 for x in leaves)
    result = Plan(
        compressor=repr(compressor),
        num_workers=num_workers,
        leaves=_leaves(link, tree, report, target),
        report=report,
        dense_float32=target.dense(tree, "float32"),
        dense_bfloat16=target.dense(tree, "bfloat16"),
        baseline="bfloat16" if narrow else "float32",
        network=measure,
        compute_seconds=compute_seconds,
        compress_seconds=compress_seconds,
    )
    if every is not None:
        parts = read_fragments("plan", every, 0, fragments, 0)
        meetings = _meetings(link, compressor, tree, target, exchange, parts, report)
        about = result.dense, result.baseline, measure
        rounds = Rounds(every, meetings, *about, compute_seconds, compress_seconds)
        return dataclasses.replace(result, rounds=rounds)
    if fragments is not None:
        raise ValueError("`plan(fragments=...)` goes with `every`, such as `every=30`.")
    advice = tuple(advise(result, compressor, tree, target))
    return dataclasses.replace(result, advice=advice)


def _meetings(
    link: Link,
    compressor: Compressor,
    tree: Any,
    target: Target,
    exchange: Any,
    parts: Fragments,
    whole: WireReport,
) -> tuple[WireReport, ...]:
    """What each meeting of a round sends."""
    labels, leaves = parts.labels(tree), jax.tree.leaves(tree)
    if labels.number == 1:
        return (whole,)
    codecs = link.codec.assign(tree)
    found = []
    for j in range(labels.number):
        mine = [i for i, part in enumerate(labels.of) if part == j]
        found.append(
            target.of(mine).report(
                _alone(codecs, mine), [leaves[i] for i in mine], exchange
            )
        )
    return tuple(found)


def _alone(codecs: list[Codec], mine: list[int]) -> Compressor:
    """What compresses a list of some of the leaves, each as in the whole tree."""
    if len({codecs[i] for i in mine}) == 1:
        return make(codecs[mine[0]])
    makers: dict[Hashable, Compressor] = {i: make(codecs[i]) for i in mine}
    return partition(makers, lambda _: mine)


def _check_flat(num_workers: Any, of_a_mesh: Mapping[str, Any]) -> None:
    for name, value in of_a_mesh.items():
        if value is not None:
            raise ValueError(
                f"`plan({name}=...)` goes with `mesh`, such as "
                '`mesh={"dcn": 4, "fsdp": 64}`.'
            )
    if type(num_workers) is not int or not 1 <= num_workers < 2**31:
        raise ValueError(
            "`plan(num_workers=...)` must be an int of at least 1 and below 2**31, "
            f"got {num_workers!r}"
            + ("; or give `mesh`." if num_workers is None else ".")
        )


def _check_no_flat(num_workers: Any, bandwidth: Any, latency: float) -> None:
    if num_workers is not None:
        raise ValueError(
            "`plan(num_workers=...)` is of a flat axis; with `mesh` the workers are "
            "those along `axis_name`."
        )
    if bandwidth is not None or latency:
        raise ValueError(
            "`plan(bandwidth=..., latency=...)` are of a flat axis; with `mesh` give "
            '`networks={"dcn": Network(bandwidth=..., latency=...)}`, by axis.'
        )


def _slow_axes(link: Link, tree: Any) -> tuple[str, ...]:
    """The axes over which messages differ."""
    assert link.axes is not None
    levels = [way.level(link.axes).names for way in link.routes(tree)]
    found = {name for names in levels for name in names}
    return tuple(n for n in link.axes.names if n in found or not levels)


def _mesh_networks(
    place: Place,
    slow: tuple[str, ...],
    networks: Mapping[str, Network],
    devices_per_card: Mapping[str, int],
) -> MeshNetworks:
    sizes = dict(place.sizes)
    for api, given in (("networks", networks), ("devices_per_card", devices_per_card)):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"`plan({api}=...)` must be a mapping by axis, got "
                f"{type(given).__name__}."
            )
        allowed = slow if given is devices_per_card else tuple(sizes)
        for name in given:
            if name not in allowed:
                raise ValueError(
                    f"`plan({api}=...)` must name "
                    f"{'the slow axis' if allowed is slow else 'axes of the mesh'}, "
                    f"{', '.join(map(repr, allowed))}; got {name!r}."
                )
        if len({given[name] for name in slow if name in given}) > 1:
            raise ValueError(
                f"`plan({api}=...)`: {', '.join(map(repr, slow))} are the axes of the "
                "workers and count as one slow axis; give them one and the same."
            )
    for name, network in networks.items():
        if not isinstance(network, Network):
            raise TypeError(
                f"`plan(networks=...)` must be a `Network` by axis, got "
                f"{type(network).__name__} for {name!r}."
            )
        _check_network(network, f"networks={{{name!r}: Network(", ")}")
    behind = math.prod(n for name, n in sizes.items() if name not in slow)
    per_card = next((devices_per_card[n] for n in slow if n in devices_per_card), 1)
    if type(per_card) is not int or per_card < 1 or behind % per_card:
        raise ValueError(
            "`plan(devices_per_card=...)` must be an int of at least 1 that divides "
            f"the {behind} devices of one position on the slow axis, got {per_card!r}."
        )
    return MeshNetworks(
        slow,
        next((networks[name] for name in slow if name in networks), Network()),
        tuple((name, given) for name, given in networks.items() if name not in slow),
        per_card,
    )


def _check_numbers(bandwidth, latency, compute, compress):
    _check_network(Network(bandwidth, latency))
    _check_seconds("compute_seconds=...", compute)
    _check_seconds("compress_seconds=...", compress)


def _check_network(network: Network, before: str = "", after: str = "") -> None:
    if network.bandwidth is not None and not 0 < network.bandwidth < math.inf:
        raise ValueError(
            f"`plan({before}bandwidth=...{after})` must be a positive number of bits a "
            f"second, or None for no prediction of time, got {network.bandwidth!r}."
        )
    _check_seconds(f"{before}latency=...{after}", network.latency)


def _check_seconds(where: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(
            f"`plan({where})` must be a number of seconds, not negative, got {value!r}."
        )


def _structs(params: Any) -> Any:
    def struct(path, x):
        dtype = check_float(path, x, "`plan(params)`")
        return jax.ShapeDtypeStruct(jnp.shape(x), dtype)

    return jax.tree_util.tree_map_with_path(struct, params)


def _leaves(
    link: Link, tree: Any, report: WireReport, target: Target
) -> tuple[LeafPlan, ...]:
    """Each leaf's share of what travels by the same exchange as it does."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    codecs = link.codec.assign(tree)
    routes = [way.name for way in link.routes(tree)]
    shapes = [x.shape for _, x in named]
    if target.place is not None:
        shapes = target.place.pieces(link, tree)
    bits = [
        _payload_bits(codec, shape, x.dtype)
        for codec, shape, (_, x) in zip(codecs, shapes, named, strict=True)
    ]
    totals: dict[str, tuple[int, WireReport]] = {}
    for route in dict.fromkeys(routes):
        mine = [i for i, r in enumerate(routes) if r == route]
        sent = report
        if len(mine) < len(routes):
            alone, some = _alone(codecs, mine), [named[i][1] for i in mine]
            way = hierarchical(link.fast, exchange=route) if link.fast else route
            sent = target.of(mine).report(alone, some, way)
        totals[route] = max(1, sum(bits[i] for i in mine)), sent
    leaves = []
    for i, (path, x) in enumerate(named):
        all_bits, sent = totals[routes[i]]
        leaves.append(
            LeafPlan(
                name=jax.tree_util.keystr(path) or "the leaf",
                shape=x.shape,
                compressor=repr(codecs[i]),
                exchange=routes[i],
                payload_bits=bits[i],
                operand_bytes=sent.operand_bytes * bits[i] / all_bits,
                bytes_sent_per_worker=sent.bytes_sent_per_worker * bits[i] / all_bits,
            )
        )
    return tuple(leaves)


@functools.lru_cache(maxsize=4096)
def _payload_bits(codec: Codec, shape: tuple[int, ...], dtype: np.dtype) -> int:
    return make(codec).payload_bits(shape, dtype) if math.prod(shape) else 0
