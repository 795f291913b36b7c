"""The algorithms once more, in float64 NumPy, written from the papers to be read.

The tests compare `efopt` with these functions, so nothing here is shared with it:
no jax, no packing, no collectives, only what an algorithm means.

Words and shapes
    leaf        array of any shape; blocks are cut from its flat (C order) view
    leaves      list of leaves, one worker's whole update
    updates     list over workers of leaves: ``updates[worker][leaf]``
    grads       sequence over steps t of updates: ``grads[t][worker][leaf]``; where a
                scheme moves x itself, an entry may be a function of the current x
                (a list of leaves) that returns the updates
    compress    function leaf -> leaf of the same shape, or a list of such functions,
                one for each leaf

sign(0) = +1 everywhere, for -0.0 too: one bit has no room for a third value.
No function modifies its arguments.
"""

import math

import ml_dtypes
import numpy as np

# ----------------------------------------------------------------- compressors


def split_blocks(x, block_size=None):
    """Cut a leaf of any shape into its list of 1-D blocks; the last may be shorter.

    ``None`` makes the whole leaf one block; an empty leaf has no block.
    """
    flat = np.array(x, dtype=np.float64).reshape(-1)
    size = flat.size if block_size is None else block_size
    if flat.size == 0:
        return []
    return [flat[i : i + size] for i in range(0, flat.size, size)]


def join_blocks(blocks, shape):
    """Undo `split_blocks`: the list of 1-D blocks as one array of ``shape``."""
    return np.concatenate([np.zeros(0), *blocks]).reshape(shape)


def identity(x):
    """C(x) = x, delta = 1 (section 0 of the notes). x: any shape."""
    return np.array(x, dtype=np.float64)


def sign(x):
    """signSGD's operator (1802.04434, Algorithm 1): +1 where x >= 0, else -1.

    x: any shape. Neither contractive nor homogeneous: it forgets the length of x.
    """
    return np.where(np.asarray(x, dtype=np.float64) >= 0, 1.0, -1.0)


def scaled_sign(x, block_size=None):
    """The operator of EF-signSGD (1901.09847, Algorithm 1): mean |x| times sign(x).

    x: any shape. Each block has its own scale, taken over its true coordinates, as in
    the block-wise form of 1905.10936. A block of zeros has scale 0 and stays zero.
    """
    blocks = [np.abs(b).mean() * sign(b) for b in split_blocks(x, block_size)]
    return join_blocks(blocks, np.shape(x))


def top_k_count(size, k=None, fraction=None, block_size=None):
    """How many coordinates `top_k` keeps in a full block of a leaf of ``size``.

    A fraction is taken of the whole leaf, or, with a block size, of the block unit
    min(block_size, next power of four >= size, 16 at least); never below one
    coordinate. The factor 1 - 1e-12 keeps 0.07 * 100 = 7.000000000000001 and its
    like from becoming 8.
    """
    if (k is None) == (fraction is None):
        raise ValueError("give exactly one of k and fraction")
    if k is not None:
        return k
    unit = size
    if block_size is not None:
        power = 16
        while power < size:
            power *= 4
        unit = min(block_size, power)
    return max(1, math.ceil(fraction * unit * (1 - 1e-12)))


def top_k(x, k=None, fraction=None, block_size=None):
    """Top-k (1901.09847, section 4 and others): the k largest magnitudes of each block.

    x: any shape. Equal magnitudes go to the lower index; a block that is shorter than
    k is kept whole. delta >= k / (length of the block).
    """
    count = top_k_count(np.size(x), k, fraction, block_size)
    blocks = split_blocks(x, block_size)
    order = [np.argsort(-np.abs(b), kind="stable") for b in blocks]
    return mask_k(x, [o[:count] for o in order], block_size)


def tiles(x, tile):
    """The tiles of a matrix, row by row, whose sides divide its last two axes.

    The largest that do and are not above those of ``tile``; ``None`` where they leave
    less than a quarter of its area, and of what is no matrix.
    """
    x = np.asarray(x, np.float64)
    if x.ndim < 2 or x.size == 0:
        return None
    sides = [
        max(s for s in range(1, t + 1) if n % s == 0)
        for n, t in zip(x.shape[-2:], tile, strict=True)
    ]
    if 4 * sides[0] * sides[1] < tile[0] * tile[1]:
        return None
    corners = [
        (m, i, j)
        for m in range(int(np.prod(x.shape[:-2])))
        for i in range(0, x.shape[-2], sides[0])
        for j in range(0, x.shape[-1], sides[1])
    ]
    return corners, sides


def tiled_top_k(x, k, tile):
    """Top-k of every tile of a matrix, ``k`` of a whole one; else of runs as long."""
    found, area = tiles(x, tile), tile[0] * tile[1]
    if found is None:
        return top_k(x, fraction=k / area, block_size=area)
    x = np.asarray(x, np.float64)
    matrices = x.reshape(-1, *x.shape[-2:])
    out = np.zeros_like(matrices)
    corners, (rows, columns) = found
    for m, i, j in corners:
        window = np.s_[m, i : i + rows, j : j + columns]
        out[window] = top_k(matrices[window], fraction=k / area)
    return out.reshape(x.shape)


def two_magnitudes(x, block_size=None):
    """Signs, and of each block the mean magnitude of those above the mean and below."""

    def one(b):
        high = np.abs(b) > np.abs(b).mean()
        out = np.zeros(b.size)
        for some in (high, ~high):
            if some.any():
                out[some] = np.abs(b[some]).mean()
        return out * sign(b)

    return join_blocks([one(b) for b in split_blocks(x, block_size)], np.shape(x))


def mask_k(x, indices, block_size=None):
    """Random-k without scaling, the randomness handed in: keep the named coordinates.

    x: any shape. indices: one array of positions for each block, counted from the
    start of that block. delta = k/d with equality in expectation over uniform masks
    (section 0 of the notes); times d/k the same thing is unbiased with omega = d/k - 1.
    """
    kept = []
    for block, index in zip(split_blocks(x, block_size), indices, strict=True):
        index = np.asarray(index, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= block.size):
            raise IndexError(f"index outside a block of {block.size} coordinates")
        out = np.zeros_like(block)
        out[index] = block[index]
        kept.append(out)
    return join_blocks(kept, np.shape(x))


def threshold(x, least, k=None, fraction=None, block_size=None):
    """Hard threshold (2108.00951) of bounded capacity: of the top k, those that reach
    ``least`` in magnitude. x: any shape."""
    kept = top_k(x, k, fraction, block_size)
    return np.where(np.abs(kept) >= least, kept, 0.0)


def rounded_up(step):
    """A step of 8 significant bits, 1 to 1 + 2**-7 times as large: the nearest such
    number to (1 + 2**-8) times the step, ties to even."""
    mantissa, exponent = np.frexp(step * (1 + 2.0**-8))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8)


def uniform_levels(x, levels, block_size=None, scale="absmax"):
    """QSGD's grid (1610.02132) and TernGrad's (1705.07878): the multiples of the step
    that stand around each coordinate.

    x: any shape. The step of a block is its largest magnitude, or its l2 norm, divided
    by ``levels`` and rounded up. Returns (low, high), each of the shape of x, at most
    ``levels`` steps from zero.
    """
    low, high = [], []
    for block in split_blocks(x, block_size):
        whole = np.abs(block).max() if scale == "absmax" else np.linalg.norm(block)
        step = rounded_up(whole / levels)
        down = np.floor(block / step) if step else np.zeros_like(block)
        low.append(np.clip(down, -levels, levels) * step)
        high.append(np.clip(down + 1, -levels, levels) * step)
    return join_blocks(low, np.shape(x)), join_blocks(high, np.shape(x))


def powers_of_two(x):
    """Natural compression (1905.10988): the powers of two around each magnitude.

    x: any shape. Returns (low, high) with the sign of x; zero stays zero.
    """
    x = np.asarray(x, dtype=np.float64)
    down = 2.0 ** np.floor(np.log2(np.where(x == 0, 1, np.abs(x))))
    return np.sign(x) * down, np.sign(x) * down * 2


def cast(x, dtype, block_size=None):
    """Rounding to a shorter float, half to even; 8-bit ones after a division by the
    power of two that brings the largest magnitude of a block under the largest value.

    x: any shape, of float32 values.
    """
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    info = ml_dtypes.finfo(dtype)
    out = []
    for block in split_blocks(x, block_size):
        power = 1.0
        if info.bits == 8 and block.any():
            power = 2.0 ** np.ceil(np.log2(np.abs(block).max() / float(info.max)))
        largest = float(info.max)
        small = np.clip(block / power, -largest, largest).astype(np.float32)
        out.append(small.astype(dtype).astype(np.float64) * power)
    return join_blocks(out, np.shape(x))


def contraction(x, cx):
    """Realised delta of 1901.09847, Assumption A: 1 - ||cx - x||^2 / ||x||^2.

    x, cx: the same shape. For x = 0 it is 1 if cx is zero as well, else -inf.
    """
    x, cx = np.asarray(x, dtype=np.float64), np.asarray(cx, dtype=np.float64)
    wrong, whole = np.sum((cx - x) ** 2), np.sum(x**2)
    if whole == 0:
        return 1.0 if wrong == 0 else -math.inf
    return 1.0 - float(wrong / whole)


def orthonormalise(p):
    """Orthonormal columns with the span of p, by Gram-Schmidt (1905.13727, Alg. 1).

    p: (rows, r). Each column keeps a positive product with its original (R of p = QR
    has a positive diagonal); a second pass removes what rounding left of the first.
    A column that depends on the earlier ones adds nothing to the span: it becomes 0.
    """
    p = np.array(p, dtype=np.float64)
    for j in range(p.shape[1]):
        before = np.linalg.norm(p[:, j])
        for _ in range(2):
            p[:, j] -= p[:, :j] @ (p[:, :j].T @ p[:, j])
        after = np.linalg.norm(p[:, j])
        p[:, j] = p[:, j] / after if after > 1e-12 * before else 0.0
    return p


def power_sgd_round(mats, qs):
    """One round of PowerSGD (1905.13727, Algorithm 1) among n workers.

    mats: n matrices (rows, cols), what each worker compresses (g_i + e_i).
    qs: (cols, r), the right factor that all workers share. P = mean M_i Q is
    orthonormalised, then Q = mean M_i^T P. Returns (average reconstruction P Q^T,
    list of local reconstructions P (M_i^T P)^T, new Q). In Algorithm 2 the residual of
    worker i is M_i minus its local one.
    """
    mats = [np.asarray(m, dtype=np.float64) for m in mats]
    p = orthonormalise(np.mean([m @ np.asarray(qs, np.float64) for m in mats], axis=0))
    shares = [m.T @ p for m in mats]
    q = np.mean(shares, axis=0)
    return p @ q.T, [p @ share.T for share in shares], q


# --------------------------------------------------------------------- helpers


def worker_mean(updates):
    """Mean over workers. updates: [worker][leaf]; returns leaves."""
    return [np.mean([identity(u) for u in leaf], axis=0) for leaf in _by_leaf(updates)]


def zeros_like(leaves):
    """Leaves of zeros, the e_0 of every algorithm here."""
    return [np.zeros(np.shape(leaf)) for leaf in leaves]


def _by_leaf(updates):
    return zip(*updates, strict=True)


def _axpy(a, xs, ys):
    """a * x + y for each leaf."""
    return [a * identity(x) + identity(y) for x, y in zip(xs, ys, strict=True)]


def _compress(compress, leaves):
    if callable(compress):
        compress = [compress] * len(leaves)
    return [c(leaf) for c, leaf in zip(compress, leaves, strict=True)]


def _rate(lr, t):
    return float(lr(t)) if callable(lr) else float(lr)


def _at(updates, x):
    return updates(x) if callable(updates) else updates


# --------------------------------------------------------------- single exchange


def compress_step(updates, compress):
    """Compression without memory (1610.02132, Algorithm 1): mean over i of C(g_i).

    updates: [worker][leaf]. Returns the average as leaves.
    """
    return worker_mean([_compress(compress, u) for u in updates])


def error_feedback_step(updates_per_worker, residuals, compress, ratio=1.0):
    """Workers' half of dist-EF-SGD (1905.10936, Algorithm 1), memory in units of g.

    updates_per_worker, residuals: [worker][leaf].
    p_i = g_i + ratio e_i;  q_i = C(p_i);  e_i = p_i - q_i.
    With ratio = eta_{t-1} / eta_t the virtual iterate x_t - eta_{t-1} mean e_i is exact
    SGD under any schedule. Returns (mean q_i as leaves, new residuals).
    """
    pairs = zip(updates_per_worker, residuals, strict=True)
    owed = [_axpy(ratio, e, g) for g, e in pairs]
    sent = [_compress(compress, p) for p in owed]
    kept = [_axpy(-1.0, q, p) for q, p in zip(sent, owed, strict=True)]
    return worker_mean(sent), kept


def two_phase_step(updates, residuals, server, compress, ratio=1.0):
    """dist-EF-SGD both ways (1905.10936, Algorithm 1); DoubleSqueeze (1905.05957).

    updates, residuals: [worker][leaf]; server: leaves, one for the whole system.
    After the workers' half, s = mean q_i + ratio * server;  out = C(s);
    server = s - out. The virtual iterate is x_t - eta_{t-1} (server + mean e_i).
    Returns (out as leaves, new residuals, new server).
    """
    average, residuals = error_feedback_step(updates, residuals, compress, ratio)
    owed = _axpy(ratio, server, average)
    out = _compress(compress, owed)
    return out, residuals, _axpy(-1.0, out, owed)


def majority_vote_step(updates, residuals=None, ratio=1.0):
    """signSGD with majority vote (1802.04434, Algorithm 3; 1810.05291, Algorithm 1).

    updates, residuals: [worker][leaf]. vote = sign(sum_i sign(p_i)), a tie votes +1.
    The papers have no memory: p_i = g_i. With residuals p_i = g_i + ratio e_i, and each
    worker has paid the vote, not its own sign: e_i = p_i - vote, which conserves the
    mean of (what was applied + what is owed). Returns (vote as leaves, new residuals),
    the latter None if none were given.
    """
    if residuals is None:
        owed = updates
    else:
        owed = [_axpy(ratio, e, g) for g, e in zip(updates, residuals, strict=True)]
    vote = [sign(np.sum([sign(p) for p in leaf], axis=0)) for leaf in _by_leaf(owed)]
    return vote, None if residuals is None else [_axpy(-1.0, vote, p) for p in owed]


def local_momentum(grads, decay, nesterov=False):
    """Heavy ball on each worker, in front of a compressor (1905.10936, Algorithm 2).

    grads: [t][worker][leaf], arrays only. m <- g + decay m from m = 0 (`optax.trace`:
    no 1 - decay); emitted is m, or g + decay m with nesterov, as [t][worker][leaf].
    """
    out, momenta = [], [zeros_like(worker) for worker in grads[0]]
    for step in grads:
        pairs = list(zip(momenta, step, strict=True))
        momenta = [_axpy(decay, m, g) for m, g in pairs]
        ahead = [_axpy(decay, m, g) for m, g in zip(momenta, step, strict=True)]
        out.append(ahead if nesterov else momenta)
    return out


# ----------------------------------------------------------------------- loops


def ef_sgd_algorithm_2(x0, grads, lr, compressor):
    """EF-SGD (1901.09847, Algorithm 2), for n workers the mean of what they send.

    x0: leaves. grads: [t][worker][leaf], one worker for the paper's own form. lr: float
    or function of t, counted from 0. The rate is inside the memory:
    p_i = gamma_t g_i + e_i;  x <- x - mean C(p_i);  e_i <- p_i - C(p_i), hence
    x_t - mean_i e_{i,t} is exactly SGD on the same gradients.
    Returns (iterates x_0..x_T as [t][leaf], residuals e_0..e_T as [t][worker][leaf]).
    """
    iterates, residuals = [[identity(leaf) for leaf in x0]], []
    for t, step in enumerate(grads):
        updates = _at(step, iterates[-1])
        if not residuals:
            residuals.append([zeros_like(x0) for _ in updates])
        scaled = [[_rate(lr, t) * identity(g) for g in u] for u in updates]
        delta, kept = error_feedback_step(scaled, residuals[-1], compressor)
        iterates.append(_axpy(-1.0, delta, iterates[-1]))
        residuals.append(kept)
    return iterates, residuals


def sgd(x0, grads, lr):
    """x <- x - lr_t mean_i g_i, the recursion that the virtual iterates obey.

    Arguments as for `ef_sgd_algorithm_2`. Returns iterates x_0..x_T as [t][leaf].
    """
    iterates = [[identity(leaf) for leaf in x0]]
    for t, step in enumerate(grads):
        mean = worker_mean(_at(step, iterates[-1]))
        iterates.append(_axpy(-_rate(lr, t), mean, iterates[-1]))
    return iterates


def signsgd(x0, grads, lr):
    """signSGD: 1802.04434, Algorithm 1 for one worker, Algorithm 3 (vote) for more.

    Arguments as for `ef_sgd_algorithm_2`. Returns iterates x_0..x_T as [t][leaf].
    """
    return signum(x0, grads, lr, 0.0)[0]


def signum(x0, grads, lr, beta, weight_decay=0.0, vote=True):
    """Signum (1802.04434, Algorithm 2), by vote for n workers (1810.05291, Alg. 1).

    Without a vote the direction is the mean of the workers' signs.

    Arguments as for `ef_sgd_algorithm_2`; every worker has a momentum of its own:
    m_i <- beta m_i + (1 - beta) g_i from 0;  x <- x - lr_t (vote(m) + weight_decay x).
    Returns (iterates as [t][leaf], momenta m_0..m_T as [t][worker][leaf]).
    """
    iterates, momenta = [[identity(leaf) for leaf in x0]], []
    for t, step in enumerate(grads):
        updates = _at(step, iterates[-1])
        if not momenta:
            momenta.append([zeros_like(x0) for _ in updates])
        pairs = zip(momenta[-1], updates, strict=True)
        fresh = [(m, [(1 - beta) * identity(g) for g in u]) for m, u in pairs]
        momenta.append([_axpy(beta, m, u) for m, u in fresh])
        if vote:
            signs, _ = majority_vote_step(momenta[-1])
        else:
            signs = compress_step(momenta[-1], sign)
        direction = _axpy(weight_decay, iterates[-1], signs)
        iterates.append(_axpy(-_rate(lr, t), direction, iterates[-1]))
    return iterates, momenta


def ef_sgd(
    x0, grads, lr, compress, momentum=0.0, nesterov=False, server=False, weight_decay=0
):
    """EF-SGD with the extras of its authors' code, and with momentum at the server.

    Arguments as for `ef_sgd_algorithm_2`. d_i = g_i + weight_decay x, then momentum
    m_i <- momentum m_i + d_i on each worker (with nesterov d_i + momentum m_i goes on),
    times the rate, plus the memory. At the server it is instead the mean of what was
    sent that goes through one momentum. Returns (iterates, residuals) as there.
    """
    iterates, residuals, inner, outer = [[identity(leaf) for leaf in x0]], [], [], []
    for t, step in enumerate(grads):
        x = iterates[-1]
        updates = [_axpy(weight_decay, x, g) for g in _at(step, x)]
        if not residuals:
            residuals.append([zeros_like(x0) for _ in updates])
            inner, outer = [zeros_like(x0) for _ in updates], [zeros_like(x0)]
        if not server:
            inner, updates = _momentum(inner, updates, momentum, nesterov)
        scaled = [[_rate(lr, t) * g for g in u] for u in updates]
        delta, kept = error_feedback_step(scaled, residuals[-1], compress)
        if server:
            outer, (delta,) = _momentum(outer, [delta], momentum, nesterov)
        iterates.append(_axpy(-1.0, delta, x))
        residuals.append(kept)
    return iterates, residuals


def dist_ef_sgd(x0, grads, lr, compress, momentum=0.0, nesterov=True, weight_decay=0):
    """dist-EF-SGD with momentum (1905.10936, dist-EF-blockSGDM), both ways.

    Arguments as for `ef_sgd_algorithm_2`; residuals in units of gradients. At a rate of
    zero only momentum moves, and the next ratio reaches back over it. Returns (iterates
    as [t][leaf], residuals as [t][worker][leaf], server residuals as [t][leaf]).
    """
    iterates, residuals, servers = [[identity(leaf) for leaf in x0]], [], []
    momenta, last = [], None
    for t, step in enumerate(grads):
        x, rate = iterates[-1], _rate(lr, t)
        updates = [_axpy(weight_decay, x, g) for g in _at(step, x)]
        if not residuals:
            residuals.append([zeros_like(x0) for _ in updates])
            servers.append(zeros_like(x0))
            momenta = [zeros_like(x0) for _ in updates]
        momenta, updates = _momentum(momenta, updates, momentum, nesterov)
        delta, kept, server = zeros_like(x0), residuals[-1], servers[-1]
        if rate != 0:
            ratio = 1.0 if last is None else last / rate
            delta, kept, server = two_phase_step(updates, kept, server, compress, ratio)
            last = rate
        iterates.append(_axpy(-rate, delta, x))
        residuals.append(kept)
        servers.append(server)
    return iterates, residuals, servers


def power_sgd_momentum(x0, grads, lr, qs, momentum, weight_decay=0):
    """PowerSGD, momentum behind the average (1905.13727, Algorithm 2).

    Arguments as for `ef_sgd_algorithm_2`. qs: the first right factor of each leaf, or
    None where it goes dense. d = average + weight_decay x;  m <- momentum m + d;
    x <- x - lr_t (d + m). Returns iterates as [t][leaf].
    """
    iterates, residuals, m, qs = [[identity(leaf) for leaf in x0]], [], [], list(qs)
    for t, step in enumerate(grads):
        x = iterates[-1]
        updates = _at(step, x)
        if not residuals:
            residuals, m = [zeros_like(x0) for _ in updates], zeros_like(x0)
        owed = [_axpy(1.0, e, g) for g, e in zip(updates, residuals, strict=True)]
        average = worker_mean(owed)
        residuals = [zeros_like(x0) for _ in updates]
        for j, q in enumerate(qs):
            if q is not None:
                mats = [p[j] for p in owed]
                average[j], own, qs[j] = power_sgd_round(mats, q)
                for e, mat, sent in zip(residuals, mats, own, strict=True):
                    e[j] = mat - sent
        d = _axpy(weight_decay, x, average)
        m = _axpy(momentum, m, d)
        iterates.append(_axpy(-_rate(lr, t), _axpy(1.0, d, m), x))
    return iterates


def _momentum(momenta, updates, decay, nesterov):
    """One step of heavy-ball momentum: (new momenta, what goes on)."""
    pairs = zip(momenta, updates, strict=True)
    momenta = [_axpy(decay, m, u) for m, u in pairs]
    if not nesterov:
        return momenta, momenta
    pairs = zip(momenta, updates, strict=True)
    return momenta, [_axpy(decay, m, u) for m, u in pairs]


# -------------------------------------------------------------------- problems


def counterexample_2(eps):
    """Where the sign always fails (1901.09847, section 3, Counterexample 2).

    f(x) = eps |x1 + x2| + |x1 - x2| for 0 < eps < 1, to be started at (1, 1). The sign
    of the subgradient is +-(1, -1), so x1 + x2 stays 2 and f >= 2 eps for any steps and
    scales. That needs sign(0) = +1: with sign(0) = 0 the first step leaves the trap.
    Returns (f, subgradient), functions of an array of shape (2,).
    """

    def f(x):
        return eps * abs(float(x[0] + x[1])) + abs(float(x[0] - x[1]))

    def subgradient(x):
        along, across = np.array([1.0, 1.0]), np.array([1.0, -1.0])
        return eps * sign(x[0] + x[1]) * along + sign(x[0] - x[1]) * across

    return f, subgradient
