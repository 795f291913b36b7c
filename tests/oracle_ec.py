"""The EC-SGD family and ECLK in plain NumPy, float64, written from the papers.

Parameters are one array `(d,)`. What the workers have of their own is `(n, d)`.
`grads(t, x, i)` is worker `i`'s gradient at `x` on its minibatch of step `t`, and
`full(x, i)` that on its whole data. Random numbers come from outside: `moves[t][i]`
says whether the reference point of worker `i` moves at the end of step `t`, and a
compressor is called as `compress(x, t)`. All functions return the iterates x_0..x_T as
`(T + 1, d)`, and after them what is said there.
"""

import numpy as np


def top_1(x, t):
    """The coordinate of largest magnitude, the first of equals."""
    out = np.zeros_like(x)
    j = np.argmax(np.abs(x))
    out[j] = x[j]
    return out


def ec_sgd(x, n, rounds, estimate, rate, compress):
    """The template of 2010.12292: v_i = C(e_i + rate u_i), x <- x - mean v_i.

    `estimate(t, x)` returns the u_i, `(n, d)`. Also returns the residuals after each
    step, `(T, n, d)`, and the u_i, `(T, n, d)`.
    """
    e, path, owed, used = np.zeros((n, len(x))), [x], [], []
    for t in range(rounds):
        u = estimate(t, x)
        v = np.stack([compress(e[i] + rate * u[i], t) for i in range(n)])
        e = e + rate * u - v
        x = x - v.mean(axis=0)
        path.append(x)
        owed.append(e)
        used.append(u)
    return np.stack(path), np.stack(owed), np.stack(used)


def plain(grads, n):
    """Gradients as they come."""
    return lambda t, x: np.stack([grads(t, x, i) for i in range(n)])


def star(estimate, reference):
    """u_i - grad f_i(x*) + mean_j grad f_j(x*)."""
    return lambda t, x: estimate(t, x) - reference + reference.mean(axis=0)


class Lsvrg:
    """g_i(x) - g_i(w_i) + grad f_i(w_i); then w_i <- x where the coin fell."""

    def __init__(self, grads, full, moves, x, n):
        self.grads, self.full, self.moves = grads, full, moves
        self.w = np.stack([x] * n)

    def __call__(self, t, x):
        u = [
            self.grads(t, x, i) - self.grads(t, w, i) + self.full(w, i)
            for i, w in enumerate(self.w)
        ]
        self.w = np.where(np.reshape(self.moves[t], (-1, 1)), x, self.w)
        return np.stack(u)


class Diana:
    """u_i - h_i + mean h; then h_i <- h_i + alpha Q(u_i - h_i)."""

    def __init__(self, estimate, quantise, alpha, x, n):
        self.estimate, self.quantise, self.alpha = estimate, quantise, alpha
        self.h = np.zeros((n, len(x)))

    def __call__(self, t, x):
        u, h = self.estimate(t, x), self.h
        told = [self.quantise(a - b, t) for a, b in zip(u, h, strict=True)]
        self.h = h + self.alpha * np.stack(told)
        return u - h + h.mean(axis=0)


def ec_lsvrg_shifted(x, n, rounds, grads, full, moves, rate, compress, tell):
    """EC-LSVRG of 2109.10049, with a learned shift behind the feedback."""
    e, h, w, path = np.zeros((n, len(x))), np.zeros((n, len(x))), x, [x]
    for t in range(rounds):
        at_w = np.stack([full(w, i) for i in range(n)])
        g = [grads(t, x, i) - grads(t, w, i) + at_w[i] - h[i] for i in range(n)]
        q = np.stack([compress(rate * g[i] + e[i], t) for i in range(n)])
        e = e + rate * np.stack(g) - q
        old, mean = x, h.mean(axis=0)
        x = x - q.mean(axis=0) - rate * mean
        h = h + np.stack([tell(at_w[i] - h[i], t) for i in range(n)])
        w = old if moves[t] else w
        path.append(x)
    return np.stack(path), e


def ecq_sgd(x, n, rounds, grads, rate, quantise, alpha, beta):
    """ECQ-SGD of 1806.08054: q = Q(g + alpha h), h <- beta h + g - q."""
    h, path = np.zeros((n, len(x))), [x]
    for t in range(rounds):
        g = np.stack([grads(t, x, i) for i in range(n)])
        q = np.stack([quantise(g[i] + alpha * h[i], t) for i in range(n)])
        h = beta * h + g - q
        x = x - rate * q.mean(axis=0)
        path.append(x)
    return np.stack(path), h


def eclk(
    x,
    n,
    rounds,
    grads,
    full,
    moves,
    l_1,
    mu,
    theta_1,
    theta_2,
    compress,
    prox=None,
):
    """ECLK (2010.00091, Algorithm 1)."""
    eta, sigma, step = 1 / (3 * theta_1), mu / (2 * l_1), 1 / (3 * theta_1 * l_1)
    y = z = w = x
    e, path = np.zeros((n, len(x))), [x]
    for t in range(rounds):
        g = np.stack([grads(t, x, i) - grads(t, w, i) for i in range(n)])
        at_w = np.mean([full(w, i) for i in range(n)], axis=0)
        q = np.stack([compress(step * g[i] + e[i], t) for i in range(n)])
        e = step * g + e - q
        after = eta * sigma * x + z - q.mean(axis=0) - step * at_w
        after = after / (1 + eta * sigma)
        if prox is not None:
            after = prox(after, step / (1 + eta * sigma))
        new_y = x + theta_1 * (after - z)
        w = y if moves[t] else w
        x = theta_1 * after + theta_2 * w + (1 - theta_1 - theta_2) * new_y
        y, z = new_y, after
        path.append(x)
    return np.stack(path)
