"""The methods since the founding papers in NumPy, float64, written from the papers.

As `oracle.py`, with its words: nothing is shared with the library. `lr` is a function
of the step. All functions return the iterates x_0..x_T, and after them what is said
there.
"""

import numpy as np
import oracle


def orthonormal(p):
    """Gram-Schmidt's columns (a QR whose triangle has a positive diagonal)."""
    q, r = np.linalg.qr(p)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def dion(x0, grads, lr, start, momentum, weight_decay=0.0):
    """Dion on averaged gradients, centralised (2504.05295, Algorithm 1).

    x0: one matrix of inputs by outputs, the transpose of the paper's; grads:
    [t][worker]. start: the first Q,
    of the longer side. The factor of the shorter side is orthonormal, for a square
    that of the outputs.
        M <- M + G;  P <- orth(M Q);  R <- M^T P;  M <- M - (1 - mu) P R^T
        Q <- R, columns of length one
        X <- (1 - lr wd) X - lr sqrt(outputs / inputs) P Q^T
    Returns (iterates, momenta).
    """
    inputs, outputs = np.shape(x0)
    turned = outputs <= inputs
    x = np.asarray(x0, np.float64)
    m, q = np.zeros_like(x), np.asarray(start, np.float64)
    iterates, momenta = [x], [m]
    for t, step in enumerate(grads):
        m = m + np.mean(np.asarray(step, np.float64), axis=0)
        view = m.T if turned else m
        p = orthonormal(view @ q)
        r = view.T @ p
        q = r / np.linalg.norm(r, axis=0)
        part, direction = p @ r.T, p @ q.T
        if turned:
            part, direction = part.T, direction.T
        m = m - (1 - momentum) * part
        x = (1 - lr(t) * weight_decay) * x
        x = x - lr(t) * np.sqrt(outputs / inputs) * direction
        iterates.append(x)
        momenta.append(m)
    return iterates, momenta


def distributed_lion(
    x0,
    grads,
    lr,
    b1,
    b2,
    weight_decay=0.0,
    vote=True,
    coins=None,
    compress=None,
    average_every=None,
):
    """Distributed Lion (2404.00438, Algorithm 1), by vote or by the mean of signs.

    x0: leaves; grads: [t][worker][leaf]. coins: [t][leaf] of +1 and -1, what becomes of
    a tied vote. With compress, Lion Cub (2411.16462): the sign of the mean of C(u_i),
    and momenta averaged at every ``average_every``-th step.
        u_i = b1 m_i + (1 - b1) g_i;  m_i <- b2 m_i + (1 - b2) g_i
        x <- x - lr (sign(sum_i sign(u_i)) + wd x)
    Returns (iterates, momenta of the last step as [worker][leaf]).
    """
    iterates = [[oracle.identity(leaf) for leaf in x0]]
    momenta = [oracle.zeros_like(x0) for _ in grads[0]]
    for t, step in enumerate(grads):
        mix = lambda b, m, g: [  # noqa: E731
            b * p + (1 - b) * q for p, q in zip(m, g, strict=True)
        ]
        ahead = [mix(b1, m, g) for m, g in zip(momenta, step, strict=True)]
        momenta = [mix(b2, m, g) for m, g in zip(momenta, step, strict=True)]
        if average_every is not None and (t + 1) % average_every == 0:
            momenta = [oracle.worker_mean(momenta) for _ in momenta]
        say = oracle.sign if compress is None else compress
        mean = oracle.worker_mean([[say(u) for u in worker] for worker in ahead])
        if compress is not None:
            mean = [np.sign(m) for m in mean]
        elif vote:
            mean = [
                np.where(m == 0, coin, np.sign(m))
                for m, coin in zip(mean, coins[t], strict=True)
            ]
        x = iterates[-1]
        iterates.append(
            [p - lr(t) * (u + weight_decay * p) for p, u in zip(x, mean, strict=True)]
        )
    return iterates, momenta


def frozen_adam(
    x0, grads, lr, compress, dense, b1, b2, eps, weight_decay=0.0, scaled=False
):
    """1-bit Adam (2102.02888, Algorithm 1), and 0/1 Adam without local steps.

    x0: leaves; grads: [t][worker][leaf]. dense: whether at a step gradients are
    averaged uncompressed and the variance moves: the warm-up, or T_v of 2202.06009.
        dense: m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2, of the mean g
        else:  m <- what two-way error feedback makes of the b1 m + (1 - b1) g_i
        x <- x - lr (m / (sqrt(v) + eps) + wd x)
    scaled: whether what is compressed is the rate times the momentum, as in 0/1 Adam;
    of the momentum itself, residuals then take the ratio of the rates of this sending
    and the last.
    Returns (iterates, variances of the last step, residuals as [worker][leaf]).
    """
    iterates = [[oracle.identity(leaf) for leaf in x0]]
    m, v, server = (oracle.zeros_like(x0) for _ in range(3))
    owed, before = [oracle.zeros_like(x0) for _ in grads[0]], 0.0
    for t, step in enumerate(grads):
        own = [[b1 * p + (1 - b1) * q for p, q in zip(m, g, strict=True)] for g in step]
        if dense(t):
            m, mean = oracle.worker_mean(own), oracle.worker_mean(step)
            v = [b2 * p + (1 - b2) * q**2 for p, q in zip(v, mean, strict=True)]
        elif scaled:  # in units of steps, as the paper has it
            rate = lr(t)
            steps = [[rate * p for p in worker] for worker in own]
            waits = [[before * e for e in worker] for worker in owed]
            late = [before * e for e in server]
            out, waits, late = oracle.two_phase_step(steps, waits, late, compress)
            m = [u / rate for u in out]
            owed = [[e / rate for e in worker] for worker in waits]
            server, before = [e / rate for e in late], rate
        else:
            m, owed, server = oracle.two_phase_step(own, owed, server, compress)
        pairs = zip(iterates[-1], m, v, strict=True)
        iterates.append(
            [
                x - lr(t) * (p / (np.sqrt(q) + eps) + weight_decay * x)
                for x, p, q in pairs
            ]
        )
    return iterates, v, owed


def zero_one_adam(
    x0, grads, workers, lr, compress, dense, meets, b1, b2, eps, weight_decay=0.0
):
    """0/1 Adam with local steps (2202.06009, Algorithm 1).

    x0: leaves; grads: [t] of functions from the workers' parameters, [worker][leaf], to
    their gradients. workers: their number. dense: whether a step is of T_v; meets:
    whether of T_u.
        3-5:  m_i <- b1 m_i + (1 - b1) g_i;  x_i <- x_i - lr m_i / (sqrt(v) + eps)
              u_i <- u_i + lr m_i
        7-10: at T_u, r the rates since the last such step and x' the parameters then:
              u <- 1-bit all-reduce of the u_i;  m_i <- u / r;  u_i <- 0
              x_i <- x' - u / (sqrt(v) + eps) - r wd x'
        T_v:  v <- b2 v + (1 - b2) g^2, of the mean g
    As in `frozen_adam`, at T_v the variance moves first and the momentum takes the mean
    g as well, dense. Returns (common iterates x' after every step, the workers' own
    as [t][worker][leaf], u_i before each meeting, what workers owe in steps as
    [t][worker][leaf], what owners do as [t][leaf]).
    """
    workers = range(workers)
    common = [oracle.identity(leaf) for leaf in x0]
    v, late = oracle.zeros_like(x0), oracle.zeros_like(x0)
    x, m, u, owed = ([list(a) for _ in workers] for a in (common, v, v, v))
    rates, out = 0.0, []
    for t, grad in enumerate(grads):
        g, leaves = grad(x), range(len(x0))
        rates += lr(t)
        if dense(t):
            mean = oracle.worker_mean(g)
            v = [b2 * v[k] + (1 - b2) * mean[k] ** 2 for k in leaves]
            g = [mean for _ in workers]
        root = [np.sqrt(a) + eps for a in v]
        for i in workers:
            m[i] = [b1 * m[i][k] + (1 - b1) * g[i][k] for k in leaves]
            x[i] = [x[i][k] - lr(t) * m[i][k] / root[k] for k in leaves]
            u[i] = [u[i][k] + lr(t) * m[i][k] for k in leaves]
        moved = [list(a) for a in u]
        if dense(t) or meets(t):
            total = u[0]  # equal on all
            if not dense(t):
                total, owed, late = oracle.two_phase_step(u, owed, late, compress)
            decayed = [(1 - rates * weight_decay) * a for a in common]
            common = [decayed[k] - total[k] / root[k] for k in leaves]
            for i in workers:
                m[i] = [a / rates for a in total]
                x[i], u[i] = list(common), oracle.zeros_like(x0)
            rates = 0.0
        out.append((common, [list(a) for a in x], moved, owed, late))
    return tuple(zip(*out, strict=True))
