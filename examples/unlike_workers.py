"""Eight workers whose data differ: error feedback, EF21, EF21-SGDM and EControl.

Each worker has a quadratic of its own, a 16 x 16 matrix of parameters with curvatures
from 0.1 to 1, and sends a tenth of the coordinates. Three tasks:

  exact  exact gradients, optima 1 apart, SGD at a constant rate
  noisy  gradients with noise, optima 5 apart, SGD at a constant rate
  muon   the same behind Muon without a momentum of its own: EF21-Muon

Prints the mean loss over the last quarter of the steps, and draws all of it.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import efopt

WORKERS, SHAPE = 8, (16, 16)
STYLE = Path(__file__).with_name("pictures.mplstyle")
CURVATURE = np.linspace(0.1, 1, 256, dtype=np.float32).reshape(1, *SHAPE)
TENTH = efopt.top_k(fraction=0.1)
METHODS = {
    "error feedback": efopt.error_feedback(TENTH, axis_name="data"),
    "EF21": efopt.feedback.ef21(TENTH, axis_name="data"),
    "EF21-SGDM": efopt.feedback.ef21(TENTH, beta=0.9, start=1, axis_name="data"),
    "EControl": efopt.feedback.econtrol(TENTH, axis_name="data"),
    "dense": efopt.compress(efopt.compressors.identity(), axis_name="data"),
}
MUON = optax.contrib.muon(0.02, beta=0.0, nesterov=False)
TASKS = {  # distance of the optima, noise, what stands behind
    "exact": (1.0, 0.0, optax.sgd(0.1)),
    "noisy": (5.0, 0.5, optax.sgd(0.05)),
    "muon": (5.0, 0.5, MUON),
}


def losses(feedback, apart, noise, behind, steps):
    """The loss after every step."""
    tx = optax.chain(feedback, behind)
    key, keys = jax.random.split(jax.random.key(0))
    optima = apart * jax.random.normal(key, (WORKERS, *SHAPE))

    def step(carry, key):
        x, state = carry
        grads = CURVATURE * (x - optima) + noise * jax.random.normal(key, optima.shape)
        updates, state = jax.vmap(tx.update, axis_name="data")(grads, state, x)
        x = optax.apply_updates(x, updates)
        gap = x[0] - optima.mean(axis=0)
        return (x, state), jnp.sum(CURVATURE[0] * gap**2) / 2

    x = jnp.zeros(SHAPE)
    carry = efopt.stack_workers((x, tx.init(x)), WORKERS)
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[1])
    return np.asarray(run(carry, jax.random.split(keys, steps)))


def draw(curves, path):
    """A panel a task, a line a method."""
    plt.style.use(STYLE)
    figure, panels = plt.subplots(1, len(curves), figsize=(10, 3.4))
    for panel, (task, lines) in zip(panels, curves.items(), strict=True):
        for name, line in lines.items():
            panel.plot(line, label=name)
        panel.set(title=task, xlabel="steps", yscale="log")
    panels[0].set_ylabel("loss")
    panels[0].legend()
    figure.savefig(path)


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    default = Path("unlike_workers.png")
    parser.add_argument("--output", type=Path, default=default, help="the picture")
    parser.add_argument("--steps", type=int, default=1500, help="of every run")
    args = parser.parse_args()

    line = "{:16} {:>10} {:>10} {:>10}".format
    print(line("method", *TASKS))
    curves = {task: {} for task in TASKS}
    for name, feedback in METHODS.items():
        ends = []
        for task, options in TASKS.items():
            curve = losses(feedback, *options, args.steps)
            curves[task][name] = curve
            ends.append(f"{curve[-args.steps // 4 :].mean():.2g}")
        print(line(name, *ends), flush=True)
    draw(curves, args.output)
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
