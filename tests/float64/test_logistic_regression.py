"""The driver of examples/paper/logistic_regression.py, and the papers' figures."""

import bz2
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def driver():
    """The module, without running it."""
    path = REPOSITORY / "examples" / "paper" / "logistic_regression.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def options(rounds, points=100, **changed):
    every = rounds // points
    given = dict(rate=1.0, batch=1, probability=None, shift=1.0, seed=0, tolerance=1e-8)
    return types.SimpleNamespace(rounds=rounds, every=every, **{**given, **changed})


def below(driver, curve, tolerance):
    found = driver.first_below(curve, tolerance)
    assert found is not None, (curve["method"], min(curve["gap"]))
    return found


def test_sparse_and_dense_rows_give_the_same_gradients(driver):
    # Columns of about 60 non-zeros on each worker, longer than a chunk.
    dense = scipy.sparse.random(1200, 50, 0.3, random_state=0).toarray()
    dense[:, 7] = 0  # a feature that nobody has
    features = scipy.sparse.csr_matrix(dense)
    labels = np.sign(np.random.default_rng(0).standard_normal(1200))
    x, few = jnp.linspace(-1, 1, 50), jnp.array([3, 3, 17])

    def gradients(data):
        whole = driver.gradient(x, data, 200, 0.1)
        return whole, driver.gradient(x, data.pick(few), 3, 0.1)

    found = {}
    for layout in ("dense", "sparse"):
        problem = driver.make_problem(features, labels, 6, layout=layout)
        assert type(problem.data).__name__.lower() == layout
        found[layout] = jax.vmap(gradients)(jax.tree.map(jnp.asarray, problem.data))
    assert problem.rows == 200
    for a, b in zip(found["dense"], found["sparse"], strict=True):
        assert a.shape == (6, 50)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)


def test_the_optimum_is_proved_to_fifteen_digits(driver):
    problem = driver.make_problem(*driver.load(None), 20)
    assert problem.error < 1e-15 and problem.rows == 28
    np.testing.assert_allclose(problem.optimum_grads.mean(axis=0), 0, atol=1e-15)
    a = problem.data.rows.reshape(-1, 30)
    losses = np.logaddexp(0, -a @ problem.optimum)
    value = losses.mean() + problem.l2 / 2 * problem.optimum @ problem.optimum
    assert problem.value == pytest.approx(value, abs=1e-15)
    curvature = np.linalg.norm(a, 2) ** 2 / 4 / len(a)
    assert problem.smoothness == pytest.approx(curvature + problem.l2)
    assert problem.l2 == pytest.approx(curvature / 1e4)


def test_eclk_reaches_twelve_digits_at_a_fifth_of_the_bits(driver):
    problem = driver.make_problem(*driver.load(None), 20)
    eclk = driver.run(problem, "eclk", "top-1", options(6000))
    dense = driver.run(problem, "loopless-katyusha", "top-1", options(3000))
    below(driver, eclk, 1e-12)
    spent, full = below(driver, eclk, 1e-8), below(driver, dense, 1e-8)
    assert spent["bits"] < full["bits"] / 5
    # One float64 and its index, twice that for refreshes; the first is dense.
    assert eclk["bits_per_round"] == pytest.approx(3 * (64 + 8))
    assert eclk["bits"][0] == 30 * 64
    assert dense["bits_per_round"] == pytest.approx(1.3 * 30 * 64)
    assert eclk["passes_per_round"] == pytest.approx(1 + 2 * 72 / (30 * 64))


def categories(kinds, rows):
    """One-hot features whose coordinates hardly interact, as of LIBSVM's phishing."""
    rng = np.random.default_rng(0)
    picks = [rng.choice(k, rows, p=rng.dirichlet(np.ones(k))) for k in kinds]
    features = np.hstack([np.eye(k)[p] for k, p in zip(kinds, picks, strict=True)])
    truth = features @ rng.standard_normal(sum(kinds)) + rng.standard_normal(rows)
    labels = np.sign(truth - np.median(truth))
    return scipy.sparse.csr_matrix(features / len(kinds) ** 0.5), labels


@pytest.mark.parametrize("probability", [0.1, 1.0])
def test_eclk_stays_calm_where_its_reference_moves_often(driver, probability):
    """The default is 0.03. With its steps the gap stays above its start, up to 14."""
    problem = driver.make_problem(*categories([2] * 22 + [3] * 8, 2000), 20)
    curve = driver.run(problem, "eclk", "top-1", options(1500, probability=probability))
    start, *gap = curve["gap"]
    assert max(gap) < 3 * start
    assert max(gap[-20:]) < start / 4


@pytest.mark.slow
def test_workers_on_devices_do_as_simulated_ones(driver, monkeypatch):
    problem = driver.make_problem(*driver.load(None), jax.device_count())
    curves = {}
    for devices in (jax.device_count(), 1):
        monkeypatch.setattr(jax, "device_count", lambda n=devices: n)
        curves[devices] = driver.run(problem, "eclk", "top-1", options(40, 10))["gap"]
    real, simulated = curves.values()
    np.testing.assert_allclose(real, simulated, rtol=0, atol=1e-12)


@pytest.fixture
def command(driver, monkeypatch, tmp_path):
    """Runs the script's `main` with options, in a folder of its own."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["logistic_regression.py", *map(str, words)])
        driver.main()

    monkeypatch.chdir(tmp_path)
    yield run
    jax.config.update("jax_enable_x64", True)


def test_an_output_by_the_name_of_its_picture_is_not_named_twice(command, tmp_path):
    names = "--methods", "gd", "--rounds", 2, "--points", 1, "--workers", 2
    for given in ("curves", "pictures.png", "numbers.json"):
        command(*names, "--output", given)
    stems = "curves", "pictures", "numbers"
    expected = {f"{stem}.{kind}" for stem in stems for kind in ("json", "png")}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_a_compressed_libsvm_file_becomes_curves(command, tmp_path, capsys):
    lines = [f"{1 + i % 2} {1 + i % 7}:1 {9 + i % 5}:{0.5 + i % 3}" for i in range(42)]
    text = "\n".join(lines) + "\n"
    data = tmp_path / "tiny.bz2"
    data.write_bytes(bz2.compress(text.encode()))
    names = "--methods", "gd", "eclk", "--compressors", "top-10%"
    command("--data", data, "--workers", 4, "--rounds", 400, "--points", 4, *names)
    told = capsys.readouterr().out
    assert "tiny: 4 workers with 10" in told and "by vmap" in told
    written = json.loads((tmp_path / "logistic_regression.json").read_text())
    assert written["optimal_value_error"] < 1e-15
    curves = [(c["method"], c["compressor"]) for c in written["curves"]]
    assert curves == [("gd", None), ("eclk", "top-10%")]
    for curve in written["curves"]:
        assert curve["rounds"] == [0, 100, 200, 300, 400]
        assert curve["gap"][-1] < curve["gap"][0]
    assert (tmp_path / "logistic_regression.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--float32 --tolerance 1e-9", "a tolerance of 1e-09 needs float64"),
        ("--methods adam", "invalid choice: 'adam'"),
        ("--compressors zip", "invalid choice: 'zip'"),
        ("--workers 0", "must be at least 1, got 0"),
        ("--workers 600", "569 rows are too few for 600 workers"),
        ("--condition 0", "must be above 0.0, got 0"),
        ("--data no_such_file", "no_such_file"),
        ("--output no_such_folder/curves.png", "no folder for no_such_folder/curves"),
    ],
)
def test_the_command_refuses(command, capsys, words, reason):
    with pytest.raises(SystemExit) as stop:
        command(*words.split())
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_every_method_runs(driver):
    problem = driver.make_problem(*driver.load(None), 4)
    for name in driver.METHODS:
        curve = driver.run(problem, name, "top-10%", options(40, points=2))
        assert curve["gap"][-1] < curve["gap"][0], name
        assert len(curve["gap"]) == len(curve["bits"]) == len(curve["passes"]) == 3


def test_a_tolerance_of_float64_needs_float64(driver):
    with jax.enable_x64(False):
        driver.check_tolerance(1e-6)
        with pytest.raises(ValueError, match="1e-08 needs float64"):
            driver.check_tolerance(1e-8)
    driver.check_tolerance(1e-15)


# --------------------------------------------- the papers' data, where they are at hand

ROWS = {"mushrooms": 8000, "a5a": 6400, "a9a": 32_000}


def libsvm(driver, data_dir, name):
    if data_dir is None:
        pytest.skip("no folder of LIBSVM data beside the checkout")
    features, labels = driver.load(data_dir / "libsvm" / f"{name}.bz2")
    return driver.make_problem(features[: ROWS[name]], labels[: ROWS[name]], 20)


@pytest.mark.slow
def test_the_problem_is_that_of_2010_12292(driver, data_dir):
    """Table 3c of papers.md: L, f* and f at the start."""
    problem = libsvm(driver, data_dir, "mushrooms")
    assert problem.l2 * 1e4 == pytest.approx(2.59380, abs=1e-5)
    assert problem.value == pytest.approx(0.0232243, abs=1e-7)
    curve = driver.run(problem, "gd", "top-1", options(2, 1))
    assert curve["gap"][0] + problem.value == pytest.approx(7.0546, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_eclk_goes_to_the_last_digit_on_libsvm_data(driver, data_dir, name):
    """With a fifth of the bits that loopless Katyusha needs at its best probability."""
    problem = libsvm(driver, data_dir, name)
    eclk = driver.run(problem, "eclk", "top-1", options(11_000, 110))
    below(driver, eclk, 1e-12)
    spent = below(driver, eclk, 1e-8)["bits"]
    if name == "mushrooms":
        for probability in (0.1, 0.3, 1.0):
            few = options(3000, probability=probability)
            dense = driver.run(problem, "loopless-katyusha", "top-1", few)
            assert spent < below(driver, dense, 1e-8)["bits"] / 5
    if name == "a5a":
        plain = driver.run(problem, "ec-gd", "top-1", options(10_000, 10))
        diana = driver.run(problem, "ec-gd-diana", "top-1", options(10_000, 10))
        assert diana["gap"][-1] < plain["gap"][-1] < 1e-3
        assert eclk["gap"][100] < 1e-7


@pytest.mark.slow
def test_eclk_needs_fewer_rounds_than_ec_lsvrg_diana(driver, data_dir):
    problem = libsvm(driver, data_dir, "mushrooms")
    rounds = below(driver, driver.run(problem, "eclk", "top-1", options(8000)), 1e-8)
    other = driver.run(
        problem, "ec-lsvrg-diana", "top-1", options(2 * rounds["rounds"], 10)
    )
    assert min(other["gap"]) > 1e-6
