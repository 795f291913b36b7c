"""The methods since the founding papers, in float64 NumPy, written to be read.

Words, shapes and conventions are those of `oracle.py`; nothing is shared with `efopt`.
"""

import numpy as np
from oracle import (
    _at,
    _axpy,
    _compress,
    _rate,
    identity,
    top_k,
    worker_mean,
    zeros_like,
)


def _sent(compress, t, changes):
    """What each worker says of its change; ``together``, of those of all at once."""
    together = getattr(compress, "together", None)
    if together is not None:
        return together(t, changes)
    return [_compress(compress, c) for c in changes]


def ef21(
    x0,
    grads,
    lr,
    compress,
    eta=1.0,
    dense=False,
    weight_decay=0.0,
    both=False,
    behind=None,
):
    """EF21 (2106.05203, Algorithm 2) and EF21-SGDM (2305.15155), for eta below one.

    v_i = (1 - eta) v_i + eta g_i;  c_i = C(v_i - h_i);  h_i += c_i;  h += mean c_i;
    x -= lr_t (h + weight_decay x). All begin at zero, or, dense, v_i = h_i = the first
    gradient and h their mean. Compressed both ways (EF21-BC of 2110.03294), what all
    know is h += C(mean h_i - h). ``behind`` maps each leaf of h to what is applied, as
    an orthonormalisation does (EF21-Muon, 2510.00643). Returns (iterates as [t][leaf],
    h_i as [t][worker][leaf], h as [t][leaf]).
    """
    iterates, owns, means = [[identity(leaf) for leaf in x0]], [], []
    for t, step in enumerate(grads):
        updates = _at(step, iterates[-1])
        if t == 0:
            v = [zeros_like(x0) for _ in updates]
            owns, means = [[zeros_like(x0) for _ in updates]], [zeros_like(x0)]
        if t == 0 and dense:
            v = [[identity(g) for g in u] for u in updates]
            owns.append(v)
            means.append(worker_mean(v))
        else:
            v = [
                [(1 - eta) * a + eta * identity(g) for a, g in zip(vi, u, strict=True)]
                for vi, u in zip(v, updates, strict=True)
            ]
            changes = [_axpy(-1.0, h, vi) for h, vi in zip(owns[-1], v, strict=True)]
            sent = _sent(compress, t, changes)
            owns.append([_axpy(1.0, c, h) for c, h in zip(sent, owns[-1], strict=True)])
            back = worker_mean(sent)
            if both:
                missing = _axpy(-1.0, means[-1], worker_mean(owns[-1]))
                back = _compress(compress, missing)
            means.append(_axpy(1.0, back, means[-1]))
        applied = means[-1] if behind is None else [behind(h) for h in means[-1]]
        direction = _axpy(weight_decay, iterates[-1], applied)
        iterates.append(_axpy(-_rate(lr, t), direction, iterates[-1]))
    return iterates, owns, means


def newton_schulz(g):
    """Muon's orthonormalisation, five steps of its odd polynomial of the fifth degree.

    g: (rows, columns), times sqrt(max(1, columns / rows)) at the end, Optax's scale.
    """
    x = np.asarray(g, np.float64)
    tall, width = x.shape[0] > x.shape[1], np.sqrt(max(1, x.shape[1] / x.shape[0]))
    x = (x.T if tall else x) / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x) * width


def econtrol(x0, grads, lr, compress, eta, dense=False, weight_decay=0.0):
    """EControl (2311.05645, Algorithm 2), errors in units of gradients.

    e_i <- lr_{t-1} / lr_t e_i;  c_i = C(g_i + eta e_i - h_i);  h_i += c_i;  h += mean;
    e_i += g_i - h_i;  x -= lr_t (h + weight_decay x). Dense: h_i is the first gradient.
    Returns (iterates as [t][leaf], errors as [t][worker][leaf]).
    """
    iterates, errors, last = [[identity(leaf) for leaf in x0]], [], None
    for t, step in enumerate(grads):
        updates, rate = _at(step, iterates[-1]), _rate(lr, t)
        if t == 0:
            errors = [[zeros_like(x0) for _ in updates]]
            owns, mean = [zeros_like(x0) for _ in updates], zeros_like(x0)
        ratio = 1.0 if last is None else last / rate
        last = rate
        es = [[ratio * a for a in e] for e in errors[-1]]
        if t == 0 and dense:
            owns = [[identity(g) for g in u] for u in updates]
            mean = worker_mean(owns)
        else:
            say = [_axpy(eta, e, g) for e, g in zip(es, updates, strict=True)]
            changes = [_axpy(-1.0, h, s) for h, s in zip(owns, say, strict=True)]
            sent = [_compress(compress, c) for c in changes]
            owns = [_axpy(1.0, c, h) for c, h in zip(sent, owns, strict=True)]
            mean = _axpy(1.0, worker_mean(sent), mean)
        missed = [_axpy(-1.0, h, g) for h, g in zip(owns, updates, strict=True)]
        errors.append([_axpy(1.0, m, e) for m, e in zip(missed, es, strict=True)])
        direction = _axpy(weight_decay, iterates[-1], mean)
        iterates.append(_axpy(-rate, direction, iterates[-1]))
    return iterates, errors


def arc_top_k(mats, v, k):
    """ARC-Top-K (2510.26709, Algorithm 1) among n workers.

    mats: n matrices (rows, columns). v: (columns, rank), the random numbers that all
    share. P = mean G_i V; the k rows of P with the largest squares are sent of every
    G_i, all others are zero. Returns what each worker says, n matrices; equal squares
    go to the lower row.
    """
    sketch = np.mean([np.asarray(m, np.float64) @ v for m in mats], axis=0)
    rows = np.argsort(-np.sum(sketch**2, axis=1), kind="stable")[:k]
    out = [np.zeros(np.shape(m)) for m in mats]
    for said, m in zip(out, mats, strict=True):
        said[rows] = np.asarray(m, np.float64)[rows]
    return out


def dct_matrix(size):
    """The orthonormal cosine transform, type II: row f is cos(pi (2 j + 1) f / 2 n)."""
    rows = [
        [np.cos(np.pi * (2 * j + 1) * f / (2 * size)) for j in range(size)]
        for f in range(size)
    ]
    return np.array([np.array(r) / np.linalg.norm(r) for r in rows])


def dct_top_k(x, k, tile):
    """DeMo's compressor (2411.19870, section 3): top-k of every tile's coefficients.

    x: any shape; a vector is cut in runs, leading axes are joined. The sides of a tile
    are the largest divisors of the matrix's that do not exceed ``tile``.
    """
    x = np.asarray(x, np.float64)
    if x.size == 0:
        return x
    mat = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
    a, b = (max(c for c in range(1, tile + 1) if side % c == 0) for side in mat.shape)
    down, across = dct_matrix(a), dct_matrix(b)
    out = np.zeros(mat.shape)
    for i in range(0, mat.shape[0], a):
        for j in range(0, mat.shape[1], b):
            coefficients = down @ mat[i : i + a, j : j + b] @ across.T
            kept = top_k(coefficients, k=min(k, a * b))
            out[i : i + a, j : j + b] = down.T @ kept @ across
    return out.reshape(x.shape)


def loco(x0, grads, lr, compress, store, beta, reset, weight_decay=0.0):
    """LoCo (2407.04480, Algorithm 1), uncompressed on the way back.

    h_i = g_i + e_i;  q_i = C(h_i);  e_i = store(beta e_i + (1 - beta) (h_i - q_i)), or
    zero after every ``reset``-th step;  x -= lr_t (mean q_i + weight_decay x). Returns
    iterates as [t][leaf].
    """
    iterates, errors = [[identity(leaf) for leaf in x0]], None
    for t, step in enumerate(grads):
        updates = _at(step, iterates[-1])
        if errors is None:
            errors = [zeros_like(x0) for _ in updates]
        say = [_axpy(1.0, e, g) for e, g in zip(errors, updates, strict=True)]
        sent = [_compress(compress, h) for h in say]
        lost = [_axpy(-1.0, q, h) for q, h in zip(sent, say, strict=True)]
        share = 0.0 if (t + 1) % reset == 0 else 1.0
        errors = [
            [
                store(share * (beta * a + (1 - beta) * b))
                for a, b in zip(*pair, strict=True)
            ]
            for pair in zip(errors, lost, strict=True)
        ]
        direction = _axpy(weight_decay, iterates[-1], worker_mean(sent))
        iterates.append(_axpy(-_rate(lr, t), direction, iterates[-1]))
    return iterates


def demo(x0, grads, lr, compress, decay, weight_decay=0.0):
    """DeMo (2411.19870, Algorithm 1): m_i = decay m_i + lr_t g_i;  q_i = C(m_i);
    m_i -= q_i;  x -= lr_t (sign(sum q_i) + weight_decay x). Returns iterates as
    [t][leaf]."""
    iterates, momenta = [[identity(leaf) for leaf in x0]], None
    for t, step in enumerate(grads):
        updates, rate = _at(step, iterates[-1]), _rate(lr, t)
        if momenta is None:
            momenta = [zeros_like(x0) for _ in updates]
        momenta = [
            [decay * m + rate * identity(g) for m, g in zip(*pair, strict=True)]
            for pair in zip(momenta, updates, strict=True)
        ]
        sent = [_compress(compress, m) for m in momenta]
        momenta = [_axpy(-1.0, q, m) for q, m in zip(sent, momenta, strict=True)]
        signs = [np.sign(s) for s in worker_mean(sent)]
        direction = _axpy(weight_decay, iterates[-1], signs)
        iterates.append(_axpy(-rate, direction, iterates[-1]))
    return iterates
