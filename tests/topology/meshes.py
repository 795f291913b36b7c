"""One training step on a mesh of two levels, from all entrances.

``Mesh`` names the axes, which of them joins workers, and how parameters are sharded
behind each. ``run`` feeds it gradients, another tree for every worker and step.
``flat`` does the same by hand: it cuts out in NumPy what every device compresses, its
shard of a leaf or its piece of what is equal behind a worker, and gives each device's
list to the library as a tree of its own, without a mesh.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import efopt

# For single cases of a product, which run by `pytest -m slow` as well.
NIGHTLY = pytest.mark.slow(nightly=True)
ENTRANCES = ("manual", "nested", "global")
RATE = 0.5


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A mesh, its slow axis or axes, and the type of its axes."""

    sizes: tuple[int, ...] = (2, 4)
    names: tuple[str, ...] = ("dcn", "fsdp")
    slow: Any = "dcn"
    kind: str = "auto"

    def __str__(self):
        pairs = zip(self.names, self.sizes, strict=True)
        where = self.slow if isinstance(self.slow, str) else "+".join(self.slow)
        return "x".join(f"{n}{s}" for n, s in pairs) + f"-{where}-{self.kind}"

    @property
    def slows(self):
        return self.slow if isinstance(self.slow, tuple) else (self.slow,)

    @property
    def inner(self):
        return tuple(n for n in self.names if n not in self.slows)

    def size(self, *names):
        return math.prod(self.sizes[self.names.index(n)] for n in names)

    @property
    def workers(self):
        return self.size(*self.slows)

    def make(self):
        kind = AxisType.Explicit if self.kind == "explicit" else AxisType.Auto
        devices = jax.devices()[: math.prod(self.sizes)]
        kinds = (kind,) * len(self.sizes)
        return jax.make_mesh(self.sizes, self.names, axis_types=kinds, devices=devices)


TWO_BY_FOUR = Mesh()


def is_spec(x):
    return isinstance(x, P)


EVEN = {
    "a_rows": ((16, 6), P("fsdp", None)),
    "b_columns": ((5, 16), P(None, "fsdp")),  # 20 or 40 a shard: no whole blocks
    "c_scale": ((32,), P()),
    "f_empty": ((0, 4), P()),
    "g_whole": ((6, 12), P()),  # a matrix that nobody shards
}
# Pieces of unequal length: on some devices shorter, on some nothing at all.
UNEVEN = {
    "a_rows": ((16, 6), P("fsdp", None)),
    "c_scale": ((30,), P()),
    "d_tiny": ((3,), P()),
    "e_scalar": ((), P()),
}


def task(mesh, steps=5, dtype=np.float32, seed=0, shapes=EVEN):
    """Parameters, their specs, and gradients ``(workers, *shape)`` for every step."""
    shapes = dict(shapes)
    if "tensor" in mesh.names:
        shapes |= {
            "h_both": ((8, 10), P("fsdp", "tensor")),
            "i_joined": ((24,), P(("fsdp", "tensor"))),
        }
    draws = np.random.default_rng(seed)
    params, grads = {}, [{} for _ in range(steps)]
    for name, (shape, _) in shapes.items():
        params[name] = np.asarray(draws.standard_normal(shape), dtype)
        for g in grads:
            g[name] = np.asarray(draws.standard_normal((mesh.workers, *shape)), dtype)
    return params, {name: spec for name, (_, spec) in shapes.items()}, grads


def loss(params, batch):
    """Its gradient is the batch, whose leading axis has one row a worker."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)
    wide = jnp.float32
    return sum(jnp.sum(p.astype(wide) * g[0].astype(wide)) for p, g in pairs)


def manual_specs(tree_specs, slow):
    """Specs of which only the slow axes are left, for a step mapped over these."""

    def entry(e):
        names = e if isinstance(e, tuple) else (e,)
        kept = tuple(n for n in names if n in slow)
        return kept if len(kept) > 1 else kept[0] if kept else None

    return jax.tree.map(lambda s: P(*map(entry, s)), tree_specs, is_leaf=is_spec)


def make(entrance, tx, mesh, params, specs, wrapped=None, **jit):
    """The jitted step ``(state, batch) -> state``, its state, and a batch's place."""
    on = mesh.make()
    state = {"params": params, "opt": jax.jit(tx.init)(params)}
    state = efopt.distribute(state, on, specs)

    def apply(state, grads):
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt}

    def stacked(spec):
        return P(mesh.slow, *spec)

    def place(batch):
        def put(s, x):
            return jax.device_put(x, NamedSharding(on, stacked(s)))

        return jax.tree.map(put, specs, batch, is_leaf=is_spec)

    if entrance == "global":

        def step(state, batch):
            grad = efopt.value_and_grad(loss, axis_name=mesh.slow)
            own = efopt.local_params(state["params"], mesh.slow, state["opt"])
            return apply(state, grad(own, batch)[1])

    elif entrance == "unreduced":  # a model for reduced types, on an Explicit mesh
        terms = {*mesh.slows}

        def step(state, batch):
            def total(params):
                wide = jnp.float32
                return sum(
                    jnp.sum(rows(params[k], b, specs[k]).astype(wide) * b.astype(wide))
                    for k, b in batch.items()
                )

            def rows(p, b, spec):
                whole = jnp.broadcast_to(p, b.shape)
                return jax.reshard(whole, NamedSharding(on, stacked(spec)))

            def typed(p, spec):
                return jax.reshard(p, NamedSharding(on, P(*spec, reduced=terms)))

            reduced = {k: typed(p, specs[k]) for k, p in state["params"].items()}
            return apply(state, jax.grad(lambda p: total(p) / mesh.workers)(reduced))

    elif entrance == "nested":

        def own(state, batch):
            local = efopt.local_params(state["params"], mesh.slow, state["opt"])
            return apply(state, jax.grad(loss)(local, batch))

        only = manual_specs(efopt.partition_specs(state, specs), mesh.slows)
        step = jax.shard_map(
            own,
            mesh=on,
            in_specs=(only, P(mesh.slow)),
            out_specs=only,
            axis_names=set(mesh.slows),
        )
    else:

        def own(state, batch):
            return apply(state, jax.tree.map(lambda g: g[0], batch))

        placed = efopt.partition_specs(state, specs)
        batches = jax.tree.map(stacked, specs, is_leaf=is_spec)
        step = jax.shard_map(own, mesh=on, in_specs=(placed, batches), out_specs=placed)
    return jax.jit(wrapped(step) if wrapped else step, **jit), state, place


def run(entrance, tx, mesh, params, specs, grads):
    """The state after all gradients, as global arrays on the mesh."""
    step, state, place = make(entrance, tx, mesh, params, specs)
    for g in grads:
        state = step(state, place(g))
    return state


# ------------------------------------------------------------------------ by hand


@dataclasses.dataclass(frozen=True)
class Part:
    """What the devices behind a worker hold of a leaf, and which piece they compress.

    Attributes:
      mesh: The mesh.
      shape: The leaf's global shape.
      spec: How it is sharded.
      cut: Whether what is equal on several devices is cut in pieces over them.
    """

    mesh: Mesh
    shape: tuple[int, ...]
    spec: P
    cut: bool

    def devices(self):
        """The position on the inner axes of every device behind a worker."""
        sizes = [self.mesh.size(n) for n in self.mesh.inner]
        for flat in range(math.prod(sizes)):
            yield dict(zip(self.mesh.inner, np.unravel_index(flat, sizes), strict=True))

    def window(self, at):
        """The slices of the global array that the device at a position holds."""
        out = [slice(None)] * len(self.shape)
        for d, entry in enumerate(self.spec):
            names = entry if isinstance(entry, tuple) else (entry,)
            names = [n for n in names if n is not None]
            number, length = 0, self.shape[d] // self.mesh.size(*names)
            for n in names:
                number = number * self.mesh.size(n) + int(at[n])
            out[d] = slice(number * length, (number + 1) * length)
        return tuple(out)

    def spare(self):
        if not self.cut or math.prod(self.shape) == 0:
            return ()
        named = {n for e in self.spec for n in (e if isinstance(e, tuple) else (e,))}
        return tuple(n for n in self.mesh.inner if n not in named)

    def take(self, x, at, padded=False):
        """What one device compresses of a global array; the last pieces are shorter."""
        shard, spare = np.asarray(x)[self.window(at)], self.spare()
        if not spare:
            return shard
        number, n = 0, self.mesh.size(*spare)
        for name in spare:
            number = number * self.mesh.size(name) + int(at[name])
        length = -(-shard.size // n)
        flat = shard.reshape(-1)
        if padded:
            flat = np.pad(flat, (0, n * length - shard.size))
        return flat[number * length : (number + 1) * length]

    def join(self, pieces):
        """The global array from what all devices, in order, have."""
        out = np.zeros(self.shape, pieces[0].dtype)
        spare = self.spare()
        for at in self.devices():
            window = self.window(at)
            same = [
                piece
                for other, piece in zip(self.devices(), pieces, strict=True)
                if all(other[n] == at[n] for n in self.mesh.inner if n not in spare)
            ]
            shape = out[window].shape
            if spare:  # in the order of the spare axes
                joined = np.concatenate(same)[: math.prod(shape)]
                out[window] = joined.reshape(shape)
            else:
                out[window] = same[0]
        return out


def parts(mesh, params, specs, compressor):
    """How each leaf is cut; what speaks in rounds is not."""

    def shard(x, spec):
        window = Part(mesh, x.shape, spec, False).window(dict.fromkeys(mesh.inner, 0))
        return x[window]

    shards = {name: shard(x, specs[name]) for name, x in params.items()}
    codecs = dict(zip(sorted(shards), compressor.codec.assign(shards), strict=True))
    return {
        name: Part(mesh, x.shape, specs[name], codecs[name].one_message)
        for name, x in params.items()
    }


def whole(tx, mesh, params, grads):
    """The same training without a mesh, for what takes shards for one array.

    Its memory of each leaf begins as on a mesh, where the first step draws it.
    """
    path = jax.tree_util.tree_map_with_path

    def start(params):
        def fresh(where, x):
            return x * 0 if ".codec" in jax.tree_util.keystr(where) else x

        return params, path(fresh, tx.init(params))

    def step(state, g):
        updates, opt = tx.update(g, state[1], state[0])
        return optax.apply_updates(state[0], updates), opt

    state = efopt.stack_workers(jax.jit(start)(params), mesh.workers)
    step = jax.jit(jax.vmap(step, axis_name=mesh.slow))
    for g in grads:
        state = step(state, g)
    return jax.tree.map(lambda x: np.asarray(x[0]), state[0])


def per_shard(codec):
    """A codec in which what would take shards for one array takes each by itself."""
    if isinstance(codec, tuple):
        return tuple(map(per_shard, codec))
    if not dataclasses.is_dataclass(codec):
        return codec
    fields = [f.name for f in dataclasses.fields(codec)]
    inside = {name: per_shard(getattr(codec, name)) for name in fields}
    if "per_shard" in inside:
        inside["per_shard"] = True
    return dataclasses.replace(codec, **inside)


def flat(tx, mesh, params, grads, cuts):
    """The same training, device by device: global parameters and the flat states."""

    def step(state, g):
        params, opt = state
        updates, opt = tx.update(g, opt, params)
        return optax.apply_updates(params, updates), opt

    for name in reversed(mesh.slows):
        step = jax.vmap(step, axis_name=name)
    step = jax.jit(step)
    sizes = tuple(mesh.size(n) for n in mesh.slows)
    # One program: outside `jit` every operation would be one of its own.
    start = jax.jit(lambda p: efopt.stack_workers((p, tx.init(p)), sizes))
    first, ends = next(iter(cuts.values())), []
    for at in first.devices():
        local = {name: cuts[name].take(x, at) for name, x in params.items()}
        state = start(local)
        for g in grads:
            own = {
                name: np.stack([cuts[name].take(row, at) for row in x])
                for name, x in g.items()
            }
            own = {n: x.reshape(*sizes, *x.shape[1:]) for n, x in own.items()}
            state = step(state, own)
        ends.append(jax.tree.map(np.asarray, state))
    first_worker = (0,) * len(sizes)
    whole = {
        name: cuts[name].join([end[0][name][first_worker] for end in ends])
        for name in params
    }
    return whole, [end[1] for end in ends]


# --------------------------------------------------------------------- what must hold


def close(got, expected, atol=1e-6):
    """Parameters equal up to rounding of the sums."""
    for name, x in expected.items():
        np.testing.assert_allclose(
            np.asarray(got[name], np.float64),
            np.asarray(x, np.float64),
            rtol=0,
            atol=atol,
            err_msg=name,
        )


def copies_equal(tree):
    """Devices that hold the same part of an array hold the same bits."""
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        seen = {}
        for shard in x.addressable_shards:
            bits = np.asarray(shard.data).tobytes()
            key = str(shard.index)
            assert seen.setdefault(key, bits) == bits, jax.tree_util.keystr(path)
