"""The methods since the founding papers, in float64 NumPy, written to be read.

Words, shapes and conventions are those of `oracle.py`; nothing is shared with `efopt`.
"""

from oracle import _at, _axpy, _compress, _rate, identity, worker_mean, zeros_like


def ef21(x0, grads, lr, compress, eta=1.0, dense=False, weight_decay=0.0):
    """EF21 (2106.05203, Algorithm 2) and EF21-SGDM (2305.15155), for eta below one.

    v_i = (1 - eta) v_i + eta g_i;  c_i = C(v_i - h_i);  h_i += c_i;  h += mean c_i;
    x -= lr_t (h + weight_decay x). All begin at zero, or, dense, v_i = h_i = the first
    gradient and h their mean. Returns (iterates as [t][leaf], h_i as [t][worker][leaf],
    h as [t][leaf]).
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
            sent = [_compress(compress, c) for c in changes]
            owns.append([_axpy(1.0, c, h) for c, h in zip(sent, owns[-1], strict=True)])
            means.append(_axpy(1.0, worker_mean(sent), means[-1]))
        direction = _axpy(weight_decay, iterates[-1], means[-1])
        iterates.append(_axpy(-_rate(lr, t), direction, iterates[-1]))
    return iterates, owns, means


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
