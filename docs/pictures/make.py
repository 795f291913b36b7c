"""Makes the pictures of the documentation, all in one style, in the folder above.

    python docs/pictures/make.py

Drawings are of what efopt computes: the gradient of `gradient.svg` is compressed by
`scaled_sign`. Charts are drawn from `examples/benchmarks/results`. The compressors'
is drawn by `python examples/compressors.py --output docs/compressors.png`.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

import efopt

DOCS = Path(__file__).resolve().parents[1]
EXAMPLES = DOCS.parent / "examples"
BLUE, ORANGE, GREEN, GREY = "#0b5c8a", "#d9822b", "#4b8f5a", "#8a8f98"
SIDE, SHARD, BLOCK = 12, 3, 6  # of a leaf, of one device's rows, of a block


class Sheet:
    """A figure that is drawn on in inches."""

    def __init__(self, width, height):
        self.figure = plt.figure(figsize=(width, height), layout="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def text(self, x, y, text, **options):
        options = {"ha": "center", "va": "center", "color": "#22262b", **options}
        self.axes.text(x, y, text, **options)

    def grid(self, x, y, values, cell=0.13, cmap="RdBu_r", limit=None, edge="white"):
        """Cells coloured by value, with the lower left corner at (x, y)."""
        limit = np.abs(values).max() if limit is None else limit
        colours = plt.get_cmap(cmap)((values / (limit or 1) + 1) / 2)
        rows, columns = values.shape
        for i in range(rows):
            for j in range(columns):
                corner = x + j * cell, y + (rows - 1 - i) * cell
                box = Rectangle(
                    corner, cell, cell, facecolor=colours[i, j], edgecolor=edge, lw=0.4
                )
                self.axes.add_patch(box)

    def frame(self, x, y, width, height, colour=GREY, fill="none", lw=1.2, **options):
        style = "round,pad=0,rounding_size=0.06"
        box = FancyBboxPatch(
            (x, y), width, height, style, facecolor=fill, edgecolor=colour, lw=lw
        )
        box.set(**options)
        self.axes.add_patch(box)

    def arrow(self, start, end, colour=GREY, bend=0.0, lw=1.4, style="-|>", **options):
        arrow = FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            mutation_scale=11,
            connectionstyle=f"arc3,rad={bend}",
            color=colour,
            lw=lw,
            shrinkA=0,
            shrinkB=0,
            **options,
        )
        self.axes.add_patch(arrow)

    def save(self, name):
        self.figure.savefig(DOCS / name, metadata={"Date": None})
        plt.close(self.figure)


def gradient():
    """What happens to the gradient of one leaf, on one device of one worker."""
    codec = efopt.scaled_sign(BLOCK)
    draws = np.random.default_rng(3)
    leaf = draws.standard_normal((SIDE, SIDE)) + 0.8 * draws.standard_normal((1, SIDE))
    shard = jnp.asarray(leaf[:SHARD], jnp.float32)
    sent, _ = jax.jit(codec.update)(shard, codec.init(shard))
    sent = np.asarray(sent)
    left, limit = np.asarray(shard) - sent, np.abs(leaf).max()
    scales = np.abs(sent).reshape(-1, BLOCK)[:, :1]

    page = Sheet(9.4, 3.5)
    cell, base = 0.13, 1.3
    # The leaf, and which rows of it this device holds.
    page.grid(0.25, base, leaf, cell, limit=limit)
    rows = SHARD * cell
    top = base + SIDE * cell - rows
    page.frame(0.25, top, SIDE * cell, rows, ORANGE, lw=2)
    page.text(0.25 + SIDE * cell / 2, 3.15, "leaf", weight="bold")
    page.text(1.03, 1.1, "gradient of this worker\n+ what it owes", size=8, va="top")
    page.arrow((1.86, top + rows / 2), (2.3, top + rows / 2))
    # Its shard.
    page.grid(2.4, top, leaf[:SHARD], cell, limit=limit)
    page.frame(2.4, top, SIDE * cell, rows, ORANGE, lw=2)
    page.text(3.18, 3.15, "shard", weight="bold")
    page.text(3.18, top - 0.12, "what this device holds", size=8, va="top")
    page.arrow((4.0, top + rows / 2), (4.42, top + rows / 2))
    # Blocks, each with a payload.
    blocks = leaf[:SHARD].reshape(-1, BLOCK)
    signs = np.sign(sent).reshape(-1, BLOCK)
    step = 0.22
    for i in range(len(blocks)):
        y = 2.88 - i * step
        page.grid(4.55, y, blocks[i : i + 1], cell, limit=limit)
        page.grid(6.0, y, signs[i : i + 1], cell, "gray", 1.25, GREY)
        width = 0.4 * scales[i, 0] / scales.max()
        page.frame(6.9, y, width, cell, GREEN, GREEN, lw=0)
    page.text(4.94, 3.15, "blocks", weight="bold")
    page.text(6.65, 3.15, "payload", weight="bold")
    page.text(4.94, 1.65, "compressed\none by one", size=8, va="top")
    page.text(6.65, 1.65, "a bit a coordinate,\na scale a block", size=8, va="top")
    page.arrow((5.45, 2.4), (5.9, 2.4))
    page.arrow((7.42, 2.4), (7.9, 2.4))
    # The exchange.
    page.text(8.65, 3.15, "exchange", weight="bold")
    for y in (2.75, 2.4, 2.05):
        page.frame(8.0, y - 0.1, 0.3, 0.2, BLUE, "#e8f1f7")
        page.arrow((8.32, y), (8.78, 2.4), BLUE, lw=1)
    page.frame(8.8, 2.25, 0.42, 0.3, BLUE, BLUE)
    page.text(9.01, 2.4, "mean", color="white", size=7.5)
    page.text(8.65, 1.65, "the slow network:\nall that crosses it", size=8, va="top")
    # What is left.
    page.grid(4.2, 0.42, left, cell, limit=limit)
    page.frame(4.2, 0.42, SIDE * cell, rows, GREEN, lw=2)
    page.text(5.95, 0.62, "residual:", weight="bold", ha="left")
    page.text(5.95, 0.44, "shard less what the payload says", size=8, ha="left")
    page.arrow((4.94, 1.22), (4.94, 0.87), GREEN)
    page.arrow((4.1, 0.62), (1.03, 0.62), GREEN)
    page.text(2.6, 0.42, "stays here, added to the next gradient", size=8)
    page.save("gradient.svg")


def two_level():
    """Two slices of four devices, and what moves where."""
    page = Sheet(9.4, 3.4)
    for left, name in ((0.3, "worker 0: a slice"), (5.7, "worker 1: a slice")):
        page.frame(left, 0.55, 3.4, 2.35, GREY, "#f5f6f8")
        page.text(left + 1.7, 3.1, name, weight="bold")
        for i in range(4):
            y = 2.33 - 0.53 * i
            page.frame(left + 0.15, y, 3.1, 0.42, BLUE, "white")
            page.text(left + 0.42, y + 0.21, f"d{i}", size=8.5)
            # A matrix in four shards of rows, and a bias that all hold.
            for j in range(4):
                fill = ORANGE if i == j else "#f0e2d2"
                page.frame(
                    left + 0.75, y + 0.29 - 0.075 * j, 1.25, 0.065, fill, fill, lw=0
                )
            for j in range(4):
                fill = GREEN if i == j else "#d8e7dc"
                page.frame(left + 2.3 + 0.2 * j, y + 0.16, 0.18, 0.1, fill, fill, lw=0)
        page.text(left + 1.37, 0.4, "its rows of a matrix", size=8, color="#9a5510")
        page.text(left + 2.7, 0.4, "its piece of a bias", size=8, color="#2f6b3d")
    for i in range(4):
        y = 2.54 - 0.53 * i
        page.arrow((3.78, y), (5.62, y), BLUE, lw=1.2, style="<|-|>")
    page.text(4.7, 2.78, "payloads", size=8.5, color=BLUE)
    page.text(4.7, 0.62, "dcn: slow", weight="bold", color=BLUE)
    for left in (0.3, 5.7):
        x = left + 3.32
        page.arrow((x, 0.7), (x, 2.8), GREY, lw=1.2, style="<|-|>")
    page.text(2.0, 0.12, "fsdp: fast. Pieces are gathered here, nothing else", size=8)
    page.text(7.4, 0.12, "fsdp: fast", size=8)
    page.save("two_level.svg")


def charts():
    """Those of the benchmarks, from their stored results."""
    sys.path.insert(0, str(EXAMPLES / "benchmarks"))
    import cluster
    import gpu

    results = EXAMPLES / "benchmarks" / "results"
    found = json.loads((results / "cluster.json").read_text())
    cluster.draw(found["results"], found["machine"], DOCS / "cluster.png")
    runs = json.loads((results / "gpu.json").read_text())["runs"]
    title = "134 M parameters on H200 GPUs of one host, jax 0.11.2, torch 2.11.0"
    gpu.draw(runs, title, DOCS / "gpu.png")


if __name__ == "__main__":
    plt.style.use(EXAMPLES / "pictures.mplstyle")
    gradient()
    two_level()
    charts()
