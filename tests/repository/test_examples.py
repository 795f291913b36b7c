"""The examples, run as a user runs them: from a shell, in a folder of their own."""

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import efopt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METHODS = ["dense", "signsgd", "ef-signsgd", "ef-signsgd-two-phase", "ef-top-k"]
PARAMETERS = 64 * 256 + 256 + 256 * 256 + 256 + 256 * 10 + 10


def run(script, *options, folder):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("NPROC", None)  # a script sees to that by itself
    environment.pop("XLA_FLAGS", None)  # it computes for long: with the fastest code
    script = script if script == "-c" else EXAMPLES / script
    command = [sys.executable, script, *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def train_digits():
    """The module, without running it."""
    spec = importlib.util.spec_from_file_location(
        "train_digits", EXAMPLES / "train_digits.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_digits")
    options = "--steps", "12", "--workers", "8", "--output", "picture.png", "--check"
    done = run("train_digits.py", *options, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_train_digits_prints_one_row_a_method(trained):
    _, done = trained
    lines = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if cells[0] in METHODS}
    assert list(rows) == METHODS
    operand = {name: int(row[1].replace(",", "")) for name, row in rows.items()}
    link = {name: int(row[3].replace(",", "")) for name, row in rows.items()}

    assert operand["dense"] == 4 * PARAMETERS + 4  # the gradients and the loss
    assert operand["dense"] >= 20 * operand["ef-signsgd"]
    # Gathered by all, one bit a coordinate is 8 times less for 8 workers. In two phases
    # bytes do not depend on their number.
    assert 7 < link["dense"] / link["ef-signsgd"] < 9
    assert link["dense"] >= 20 * link["ef-signsgd-two-phase"]
    for name, row in rows.items():
        accuracy = float(row[0].rstrip("%"))
        assert 50 < accuracy <= 100, (name, accuracy)  # ten classes, twelve steps
        assert float(row[2]) == pytest.approx(operand["dense"] / operand[name], abs=0.1)


@pytest.mark.slow
def test_train_digits_shows_progress_with_the_loss(trained):
    _, done = trained
    assert "8 workers" in done.stdout
    assert "5 runs: all 8 workers hold the same bits" in done.stdout
    for name in METHODS:
        assert re.search(rf"^{name}: 100%.*loss=\d", done.stderr, re.M), name


@pytest.mark.slow
def test_train_digits_saves_a_small_png(trained):
    folder, done = trained
    assert [path.name for path in folder.iterdir()] == ["picture.png"]
    picture = (folder / "picture.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 10_000 < len(picture) < 200_000
    assert "picture.png" in done.stdout


@pytest.mark.slow
def test_train_digits_is_the_same_on_one_device(train_digits, mesh):
    """What a single accelerator does, which no machine with 8 devices would run."""
    draws = np.random.default_rng(0)
    images = draws.normal(size=(512, 64)).astype(np.float32)
    labels = draws.integers(10, size=512).astype(np.int32)
    data = images, images[:8], labels, labels[:8]

    def losses(simulate):
        tx = train_digits.METHODS["ef-signsgd"](0.1)
        options = {"steps": 4, "seed": 0, "check": True}
        result = train_digits.train("", tx, data, mesh, simulate, **options)
        return result.losses

    np.testing.assert_allclose(losses(True), losses(False), rtol=1e-4)


def test_train_digits_help(train_digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_digits.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train_digits.main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in [*METHODS, "--steps", "--workers", "--lr", "--methods", "--output"]:
        assert word in text


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--steps 0", "must be at least 1, got 0"),
        ("--steps few", "invalid int value: 'few'"),
        ("--workers 1", "must be at least 2, got 1"),
        ("--lr -0.1", "must be positive, got -0.1"),
        ("--seed -1", "must be at least 0, got -1"),
        ("--methods adam", "invalid choice: 'adam'"),
        ("--output picture.txt", "picture.txt"),
        ("--output no_such_folder/picture.png", "no_such_folder"),
        ("--colour", "unrecognized arguments: --colour"),
    ],
)
def test_train_digits_refuses(train_digits, monkeypatch, capsys, options, reason):
    monkeypatch.setattr(sys, "argv", ["train_digits.py", *options.split()])
    with pytest.raises(SystemExit) as stop:
        train_digits.main()
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_unlike_workers_prints_one_row_a_method(tmp_path):
    done = run("unlike_workers.py", "--steps", "200", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [re.split(r"\s{2,}", x) for x in done.stdout.splitlines()]
    exact = {cells[0]: float(cells[1]) for cells in lines[1:-1]}
    assert exact["EF21"] < exact["error feedback"] / 5
    assert (tmp_path / "unlike_workers.png").stat().st_size > 10_000


@pytest.mark.slow
def test_compressors_help():
    done = run("compressors.py", "--help", folder=EXAMPLES)
    assert done.returncode == 0 and "--output" in done.stdout


@pytest.mark.slow
def test_cluster_benchmark_help_names_methods_with_a_percent_sign():
    done = run("benchmarks/cluster.py", "--help", folder=EXAMPLES)
    assert done.returncode == 0, done.stderr
    assert "block 1 %," in " ".join(done.stdout.split())


@pytest.mark.slow
def test_train_nnx(tmp_path):
    done = run("train_nnx.py", "--steps", "30", "--check", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all 8 workers hold the same bits" in done.stdout
    accuracy = re.search(r"test accuracy ([\d.]+)%", done.stdout)
    assert accuracy is not None and float(accuracy[1]) > 70, done.stdout
    gathered = re.search(r"all-gather +u32 .* ([\d,]+) +[\d,]+$", done.stdout, re.M)
    assert gathered is not None, done.stdout
    parameters = 64 * 256 + 256 + 256 * 10 + 10
    assert int(gathered[1].replace(",", "")) < 4 * parameters / 20


@pytest.mark.slow
@pytest.mark.parametrize("entrance", ["global", "nested"])
def test_train_hybrid_sends_less_between_slices(tmp_path, entrance):
    tiny = "--steps 2 --layers 1 --width 32 --length 8 --batch 8 --json found.json"
    tiny += " --check --data text.txt"  # the model's size follows its alphabet
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 96)) * 50)
    methods = "--methods", "dense", "sign-two-phase"
    options = "--entrance", entrance, *tiny.split(), *methods
    done = run("train_hybrid.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 runs: all workers hold the same bits" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    dense, sign = found["dense"], found["sign-two-phase"]
    assert list(found) == re.findall(r"^(dense|sign-\S+) +\d", done.stdout, re.M)
    # A quarter of 17,056 coordinates, and the loss: none of the model's activations.
    assert dense["dcn_bytes"] == 4 * 4_264 + 4 and sign["dcn_bytes"] == 4 * 234 + 4
    assert dense["fsdp_bytes"] <= sign["fsdp_bytes"] <= 1.02 * dense["fsdp_bytes"]
    assert dense["residual_bytes"] == 0 < sign["residual_bytes"]
    assert all(0 < loss < 10 for loss in dense["losses"] + sign["losses"])


@pytest.mark.slow
def test_train_hybrid_help_and_what_it_refuses(tmp_path):
    told = run("train_hybrid.py", "--help", folder=tmp_path)
    assert told.returncode == 0 and "--entrance" in told.stdout
    done = run("train_hybrid.py", "--batch", "12", folder=tmp_path)
    assert done.returncode == 2 and "multiple of 8 devices" in done.stderr


@pytest.mark.slow
def test_ef_sgd_images_tells_its_options_and_refuses_what_does_not_divide(tmp_path):
    script = "paper/ef_sgd_images.py"
    told = run(script, "--help", folder=tmp_path)
    assert told.returncode == 0 and "--workers" in told.stdout
    done = run(script, "--batch", "10", "--workers", "3", folder=tmp_path)
    assert done.returncode == 2 and "multiple of --workers" in done.stderr


def example(monkeypatch, folder, name):
    """A script as a module, without running it."""
    monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    return importlib.import_module(name)


@pytest.mark.slow
@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("seeds", ["3", "0 1 --together"])
def test_ef_sgd_images_goes_on_to_the_same_numbers(
    monkeypatch, tmp_path, capsys, seeds
):
    """From what was saved after two epochs of four, where the rate is first cut."""
    images = example(monkeypatch, "paper", "ef_sgd_images")
    monkeypatch.setattr(images.VGG19, "stages", ((1, 1),))
    options = "--width 2 --limit 40 --batch 8 --epochs 4 --save-every 1 --seeds"
    argv = ["ef_sgd_images.py", *options.split(), *seeds.split()]
    monkeypatch.setattr(sys, "argv", argv)
    args = images.parse_args()
    data = [jax.device_put(a) for a in images.load(args)]
    args.state, found = tmp_path / "whole", {}
    (tmp_path / "whole").mkdir()

    def note(about, name, seeds, record):
        found[args.state.name] = json.loads(json.dumps(record))
        result = {"method": name, "seeds": seeds, **record}
        result |= {"network": "vgg19", "batch": 8, "epochs": 4}
        (tmp_path / f"{about}.json").write_text(json.dumps(result))
        if args.state.name == "whole" and record["done"] == 2:
            shutil.copytree(tmp_path / "whole", tmp_path / "again")

    assert images.run("ef-signsgd", args.seeds, args, data, math.inf, note)
    args.state = tmp_path / "again"
    assert images.run("ef-signsgd", args.seeds, args, data, math.inf, note)
    for key in ("loss", "test"):
        assert found["again"][key] == found["whole"][key], key
    assert np.shape(found["whole"]["loss"]) == (4, len(args.seeds))
    images.table(tmp_path, None)
    rows = json.loads((tmp_path / "ef_sgd_images.json").read_text())
    assert [row["seed"] for row in rows] == args.seeds
    assert [row["loss"] for row in rows] == np.transpose(
        found["whole"]["loss"]
    ).tolist()
    assert f"ef-signsgd   {len(rows):5}" in capsys.readouterr().out


@pytest.mark.slow
@jax.numpy_rank_promotion("allow")
@jax.numpy_dtype_promotion("standard")
def test_ef_sgd_images_convolves_together_as_alone(monkeypatch):
    images = example(monkeypatch, "paper", "ef_sgd_images")
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    for size, stride in ((3, 1), (3, 2), (1, 2)):
        alone = images.Conv(4, together=False, size=size, stride=stride)
        together = images.Conv(4, together=True, size=size, stride=stride)
        params = alone.init(jax.random.key(0), x)
        want, got = alone.apply(params, x), together.apply(params, x)
        assert want.shape == got.shape == (2, 6 // stride, 6 // stride, 4)
        np.testing.assert_allclose(want, got, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_cifar10_is_read_as_it_is_packed(monkeypatch, tmp_path):
    image = pytest.importorskip("PIL.Image")
    cifar10 = example(monkeypatch, "paper", "cifar10")
    pixels = np.random.default_rng(0).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    rows = pixels.reshape(4, 1024, 3)
    for name in (*cifar10.BATCHES, cifar10.TEST):
        image.fromarray(rows).save(tmp_path / f"{name}.png")
    grid = pixels.reshape(2, 2, 32, 32, 3).swapaxes(1, 2).reshape(64, 64, 3)
    image.fromarray(grid).save(tmp_path / "again.webp", lossless=True)
    np.testing.assert_array_equal(cifar10.picture(tmp_path / "again.webp"), pixels)
    for part, n in (("train", 20), ("test", 4)):
        (tmp_path / f"{part}_lables.json").write_text(json.dumps(list(range(n))))
    x, y, test_x, test_y = cifar10.load(tmp_path)
    np.testing.assert_array_equal(x, np.concatenate([pixels] * 5))
    np.testing.assert_array_equal(test_x, pixels)
    assert y.tolist() == list(range(20)) and test_y.tolist() == list(range(4))
    with pytest.raises(ValueError, match="50000 of 32 by 32"):
        cifar10.check(x, y, test_x, test_y)


@pytest.mark.slow
def test_scale_plans_for_hosts_and_tells_what_was_measured(tmp_path):
    sizes = "--layers 1 --width 64 --inner 128 --vocabulary 256 --hosts 4 --chips"
    options = *sizes.split(), "--methods", "dense float32", "sign outer 30"
    done = run("benchmarks/scale.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "scale.json").read_text())
    dense, outer = found["rows"]
    # An all-reduce of four sends 6/4 of a shard's matrices, and vectors in pieces.
    matrices = 4 * (2 * 256 * 64 + 4 * 64 * 64 + 3 * 64 * 128)
    assert dense["bytes_of_a_card"] == pytest.approx(1.5 * matrices, rel=0.02)
    assert outer["most_of_a_card"] == pytest.approx(30 * outer["bytes_of_a_card"])
    assert outer["most_of_a_card"] < dense["bytes_of_a_card"] / 4  # padded to blocks
    program = [r for r in found["checked"] if r["what"] == "program"]
    assert program and all(r["most"][1] < 1.0001 for r in program)


@pytest.mark.slow
def test_curve_compares_seconds_to_a_common_loss(monkeypatch):
    curve = example(monkeypatch, "benchmarks", "curve")
    points = {"dense f32": [3.0, 2.0, 2.0, 2.0, 2.0], "sign two_phase": [3.0, 1.0]}
    points |= {"power_sgd": [3.0, 2.5]}
    rows = {
        name: {"points": [(1 + 10 * i, 4.0 * i, loss) for i, loss in enumerate(losses)]}
        for name, losses in points.items()
    }
    found = curve.summary({"0": rows})
    assert [r["seconds"] for r in found["dense f32"]] == [4.0]
    assert [r["seconds"] for r in found["sign two_phase"]] == [2.0]
    assert [r["seconds"] for r in found["power_sgd"]] == [None]
    assert curve.sooner(found["sign two_phase"], found["dense f32"]) == [2.0]
    assert curve.sooner(found["power_sgd"], found["dense f32"]) is None
    tried = curve.search(lambda rate: abs(rate - 3.9))
    assert sorted(tried) == [
        0.5,
        1.0,
        2.0,
        4.0,
        8.0,
    ]  # outward, and one beyond the best
    assert curve.search(lambda rate: float("nan"))[1.0] == 99.0
    losses = iter([3.0, 2.5, 2.0, 1.5])
    told = {"target": 2.0, "seconds": 1e9, "least": 0.0, "every": 2}
    step = lambda t: lambda: None  # noqa: E731
    points = curve.curve(told, step, lambda: next(losses), lambda clock: 1.0 + clock)
    assert [(t, loss) for t, _, loss in points] == [(1, 3.0), (3, 2.5), (5, 2.0)]
    state = {"opt": (curve.Held(np.int32(3), np.float32(0.5)), np.float32(1.0))}
    held, other = curve.at_rate(state, 2.0)["opt"]
    assert (held.count, held.held_rate, other) == (3, 1.0, 1.0)
    settings = {"text": 100_000, "length": 8, "seed": 1, "gpus": 2, "batch": 3}
    one, two = curve.Text(settings), curve.Text(settings)
    np.testing.assert_array_equal(one.batch(5), two.batch(5))
    assert one.batch(5).shape == (6, 9) and not np.array_equal(*map(one.batch, (5, 6)))


UNLUCKY = """
import json, sys, time
index, settings = int(sys.argv[2]), json.loads(sys.argv[3])
for method in settings["methods"]:
    if method == "stands still":
        time.sleep(600)
    if method == "dies" and index == 1:
        sys.exit(3)
    if method == "dies":
        time.sleep(600)
    if method != "fails":
        print(json.dumps({"method": method, "target": settings["target"]}), flush=True)
"""


@pytest.mark.slow
def test_what_ends_one_method_on_gpus_leaves_the_others(monkeypatch, tmp_path, capsys):
    hybrid = example(monkeypatch, "benchmarks", "gpu_hybrid")
    script = tmp_path / "unlucky.py"
    script.write_text(UNLUCKY)
    args = argparse.Namespace(gpus=2, cpu=True, one_host=False, limit=10, target=None)
    methods = ["one", "fails", "two", "dies", "three", "stands still", "four", "fails"]
    found = []
    for name, told in hybrid.launch_all(script, methods, args):
        found.append((name, told["target"]))
        args.target = len(found)  # what is found is known to processes that start anew
    assert found == [("one", None), ("two", None), ("three", 2), ("four", 3)]
    told = capsys.readouterr().err
    assert "ended with [None, 3]" in told and "nothing was heard for 10 s" in told
    args.limit, ends = 600, time.monotonic() + 2
    assert not list(hybrid.launch_all(script, ["stands still", "one"], args, ends))
    assert "no time is left" in capsys.readouterr().err


@pytest.mark.slow
def test_thresholds_sets_a_constant_and_marks_what_is_in_use(tmp_path):
    size = "--size --layers 1 --width 64 --vocabulary 512 --count"
    options = "--only AT_ONCE --output found.json", size
    done = run("benchmarks/thresholds.py", *" ".join(options).split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    ((name, rows),) = json.loads((tmp_path / "found.json").read_text())["rows"].items()
    assert name.startswith("efopt.exchanges.exchange.AT_ONCE")
    assert [value for value, row in rows.items() if row["in use"]] == ["8"]
    assert rows["1"]["bytes_a_coordinate"] > 2 * rows["8"]["bytes_a_coordinate"]


@pytest.mark.slow
def test_gpu_keeps_what_came_before_a_silence(monkeypatch, tmp_path):
    gpu = example(monkeypatch, "benchmarks", "gpu")
    script = tmp_path / "unlucky.py"
    script.write_text("""
import time
for found in '{"one": 1}', "a warning", '{"one": 1, "two": 2}':
    print(found, flush=True)
time.sleep(600)
""")
    found = list(gpu.child(script, {}, "fast", 10))
    assert found == [{"one": 1}, {"one": 1, "two": 2}]


@pytest.mark.slow
def test_conef_text_tells_its_options_and_writes_what_it_found(tmp_path):
    script, text = "paper/conef_text.py", tmp_path / "text.txt"
    done = run(script, "--batch", "10", folder=tmp_path)
    assert done.returncode == 2 and "multiple of --workers" in done.stderr
    text.write_text("to be or not to be, that is the question; " * 50)
    options = "--steps 3 --every 2 --width 32 --batch 16 --methods none ef conef-int8"
    done = run(script, "--data", text, *options.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(none|ef|conef-int8) +([\d.]+) +([\d,]+)", done.stdout, re.M)
    sizes = {name: int(size.replace(",", "")) for name, _, size in rows}
    assert sizes["none"] == 0 < sizes["conef-int8"] < sizes["ef"] / 3
    assert all(float(loss) > 0 for _, loss, _ in rows)
    assert (tmp_path / "conef_text.png").is_file()
    assert "conef-int8" in (tmp_path / "conef_text.json").read_text()


@pytest.mark.slow
def test_outer_text_tells_what_meetings_send_and_writes_what_it_found(tmp_path):
    script, text = "paper/outer_text.py", tmp_path / "text.txt"
    done = run(script, "--steps", "7", "--every", "2", folder=tmp_path)
    assert done.returncode == 2 and "multiple of --every" in done.stderr
    text.write_text("to be or not to be, that is the question; " * 50)
    options = "--steps 4 --every 2 --round 4 --width 32 --layers 1 --context 8"
    options += " --workers 2 --batch 2 --methods dense average sparse streaming"
    done = run(script, "--data", text, *options.split(), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (setting,) = json.loads((tmp_path / "outer_text.json").read_text())["settings"]
    found = setting["results"]
    assert list(found) == ["dense", "average", "sparse", "streaming"]
    assert all(np.isfinite(r["losses"][-1][1]).all() for r in found.values())
    assert found["average"]["bytes"] == found["dense"]["bytes"] / 4
    assert found["sparse"]["bytes"] < found["average"]["bytes"] / 50
    assert (tmp_path / "outer_text.png").is_file()
    # What was found stays: other options are of another folder.
    kept = (tmp_path / "outer_text.json").read_text()
    done = run(
        script, "--data", text, *options.split(), "--seeds", "2", folder=tmp_path
    )
    assert done.returncode == 1 and "choose another folder" in done.stderr
    assert (tmp_path / "outer_text.json").read_text() == kept


WRONG_LABELS = """
import jax
import noisy_labels

keys = jax.random.split(jax.random.key(0), 5)
for method, rate in ("ef-signsgd", 0.3), ("scaled-sign", 0.3), ("sgdm", 0.1):
    scores = []
    for seed in range(5):
        data = [a[None] for a in noisy_labels.digits(0.3, seed)]
        key, small = keys[seed : seed + 1], rate * 8 / 128
        scores += list(noisy_labels.accuracy(method, small, 8, 1000, data, key))
    print(100 * sum(map(float, scores)) / 5)
"""


@pytest.mark.slow
def test_error_feedback_trains_through_wrong_labels_at_batch_eight():
    """Mean of five seeds, at the rates that `noisy_labels.py` chooses by itself."""
    done = run("-c", WRONG_LABELS, folder=EXAMPLES / "paper")
    assert done.returncode == 0, done.stderr
    feedback, scaled, momentum = map(float, done.stdout.split())
    assert feedback >= scaled + 1
    assert feedback >= momentum - 1


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """Every line of it holds: the others end, and the run goes on on 3, 2 and 4."""
    done = run("killed_and_resumed.py", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 7 and all(line.startswith("ok") for line in lines), lines
    assert sum("the bits of the undisturbed run" in line for line in lines) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_late_exchange_counts_steps(tmp_path):
    options = "--messages", "top-k 5 %", "--steps", "15", "--seeds", "1"
    done = run("late_exchange.py", *options, "--target", "2.25", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(\w+) +(\d+) \([\d.]+\) +(\d+) \([\d.]+\)", done.stdout)
    assert [row[0] for row in rows] == ["none", "front", "behind"]
    assert all(0 < int(now) <= int(late) <= 15 for _, now, late in rows)


@pytest.mark.slow
def test_methods_are_compared(tmp_path):
    """Two of them, from a shell; what is stored and not named is kept."""
    dense, local = "SGD with momentum, dense", "0/1 Adam, local steps"
    options = "--steps", "16", "--rounds", "1", "--results", "methods.json"
    for name in (local, dense):
        done = run(
            "benchmarks/methods.py", *options, "--methods", name, folder=tmp_path
        )
        assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert list(rows) == [dense, local]
    parameters = 64 * 128 + 128 * 128 + 128 * 10 + 128 + 128 + 10
    assert rows[dense]["bytes"] == 2 * 3 / 4 * 4 * parameters
    # Of 16 steps 8 are dense, and of the other 8 those at distances 1, 2 and 4 send.
    signs = efopt.wire.plan(
        efopt.scaled_sign(1024),
        {
            "b": [np.zeros(n, np.float32) for n in (128, 128, 10)],
            "w": [np.zeros(s, np.float32) for s in ((64, 128), (128, 128), (128, 10))],
        },
        num_workers=4,
        exchange="two_phase",
        platform="cpu",
    )
    rest = 16 * rows[local]["bytes"] - 8 * rows[dense]["bytes"]
    assert rest == pytest.approx(4 * signs.bytes_sent_per_worker)
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
