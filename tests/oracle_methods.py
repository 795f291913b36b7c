"""The methods since the founding papers in NumPy, float64, written from the papers.

As `oracle.py`: nothing is shared with the library. Parameters are one array; `grads` is
`[t][worker]`, `lr` a function of the step. All functions return the iterates x_0..x_T,
and after them what is said there.
"""

import numpy as np


def orthonormal(p):
    """Gram-Schmidt's columns (a QR whose triangle has a positive diagonal)."""
    q, r = np.linalg.qr(p)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def dion(x0, grads, lr, start, momentum, weight_decay=0.0):
    """Dion on averaged gradients, centralised (2504.05295, Algorithm 1).

    x0: a matrix of inputs by outputs, the transpose of the paper's. start: the first Q,
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
