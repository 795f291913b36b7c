"""What the library shows, how it documents it, and what it must not touch."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import optax
import pytest
from registry import COMPRESSORS, EXCHANGES, OPTIMIZERS, SCHEMES

import efopt

PACKAGE = Path(efopt.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
COLLECTIVES = {
    "all_gather",
    "all_gather_invariant",
    "all_to_all",
    "pbroadcast",
    "pmax",
    "pmean",
    "pmin",
    "ppermute",
    "pshuffle",
    "psum",
    "psum_scatter",
    "pswapaxes",
    "ragged_all_to_all",
}


def public_functions():
    """Functions of `efopt.__all__` and of the public modules in it, by dotted name."""
    found = {}
    for name in efopt.__all__:
        thing = getattr(efopt, name)
        if inspect.isfunction(thing):
            found[name] = thing
        elif inspect.ismodule(thing):
            for inner, value in vars(thing).items():
                own = getattr(value, "__module__", "").startswith(thing.__name__)
                if own and inspect.isfunction(value) and not inner.startswith("_"):
                    found[f"{name}.{inner}"] = value
    return found


FUNCTIONS = public_functions()


def factories(shelf, *also):
    """The functions of a shelf that make something, by name; not what helps with it."""
    made = efopt.Compressor, efopt.exchanges.Exchange, optax.GradientTransformation
    made += (optax.GradientTransformationExtraArgs, *also)
    found = {n: f for n, f in vars(shelf).items() if inspect.isfunction(f)}
    annotation = lambda f: inspect.signature(f).return_annotation  # noqa: E731
    return {n: f for n, f in found.items() if annotation(f) in made}


MADE = factories(efopt.compressors)
COMPOSED = factories(efopt.feedback) | factories(efopt.convex)
COMPOSED |= factories(efopt.optimizers)
each_name = pytest.mark.parametrize("name", efopt.__all__)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def doc(thing) -> str:
    return inspect.getdoc(thing) or ""


def sections(function):
    """Names that open a section or a paragraph of a docstring, `Name:`."""
    return set(re.findall(r"^\s*([A-Z][a-z]+):", doc(function), re.M))


def raises(function, seen=None):
    """Whether it, or any function of efopt that it calls, holds a `raise`."""
    seen = set() if seen is None else seen
    function = inspect.unwrap(function)  # a factory behind `keyword_only`
    if function in seen:
        return False
    seen.add(function)
    code = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(code):
        if isinstance(node, ast.Raise):
            return True
        if not isinstance(node, ast.Call):
            continue
        owner, _, name = ast.unparse(node.func).rpartition(".")
        called = function.__globals__.get(owner or name)
        if owner and isinstance(called, types.ModuleType):
            called = getattr(called, name, None)
        ours = inspect.isfunction(called) and called.__module__.startswith("efopt.")
        if ours and raises(called, seen):
            return True
    return False


# -------------------------------------------------------------------- the names


def test_all_is_sorted_and_is_what_the_package_imports_by_name():
    (init,) = [s for s in SOURCES if s.parent == PACKAGE and s.name == "__init__.py"]
    explicit = {
        alias.asname
        for node in ast.walk(ast.parse(init.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert list(efopt.__all__) == sorted(set(efopt.__all__))
    assert set(efopt.__all__) == explicit


def test_every_factory_has_a_row_in_its_table():
    ours = lambda rows: {  # noqa: E731
        r.factory.__name__ for r in rows if r.factory.__module__.startswith("efopt")
    }
    assert ours(COMPRESSORS) == set(MADE)
    around = {"per_worker", "accumulate"}
    assert ours((*SCHEMES, *OPTIMIZERS)) == set(COMPOSED) | around
    assert ours(OPTIMIZERS) >= set(factories(efopt.optimizers))
    named = {row.name for row in EXCHANGES if row.alias}
    assert named == set(factories(efopt.exchanges))


# --------------------------------------------------------------- the docstrings


@each_name
def test_public_name_has_a_docstring(name):
    text = doc(getattr(efopt, name))
    # A NamedTuple or dataclass without one gets `Name(field, field)`.
    assert text and not text.startswith(f"{name}(")


@each_function
def test_function_documents_arguments_result_errors_and_an_example(name):
    function = FUNCTIONS[name]
    expected = {"Returns", "Examples"}
    if inspect.signature(function).parameters:
        expected.add("Args")
    if raises(function):
        expected.add("Raises")
    assert expected - sections(function) == set()
    assert ">>> " in doc(function)


@each_function
def test_function_documents_every_argument_by_name(name):
    text = doc(FUNCTIONS[name])
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert re.search(rf"^  \**{parameter}: ", text, re.M), parameter


@pytest.mark.parametrize("name", sorted(MADE | COMPOSED))
def test_compressors_and_schemes_document_wire_contract_and_source(name):
    published = {row.factory.__name__: row.published for row in COMPRESSORS}
    expected = {"Shapes", "Cost", "Properties", "Placement"}
    if published.get(name, True):
        expected.add("References")
    function = {**MADE, **COMPOSED}[name]
    assert expected - sections(function) == set()
    if "References" in expected:
        after = doc(function).split("References:")[1]
        assert "https://" in after


@pytest.mark.parametrize("name", sorted(set(MADE) - {"compose", "partition"}))
def test_documented_properties_agree_with_the_contract(name):
    """Of all rows of a factory: what all or none of them hold, and what some do."""
    rows = [row for row in COMPRESSORS if row.factory.__name__ == name]
    text = " ".join(doc(rows[0].factory).split())
    (said,) = re.findall(r"Properties:(.*?)(?:Placement:|\Z)", text)
    linear = {row.make().linear for row in rows}
    assert ("not linear" in said) or True in linear
    assert ("linear" in said.replace("not linear", "")) or True not in linear
    unbiased = {row.make().unbiased for row in rows}
    assert ("unbiased" in said) == (True in unbiased)
    contracts = {row.make().delta((8, 8)) is not None for row in rows}
    assert "no contraction" in said or True in contracts
    assert "contraction" in said.replace("no contraction", "") or True not in contracts
    if any(row.random for row in rows):
        assert "random" in said.replace("no randomness", "")


def test_signatures_are_those_of_optax():
    for make in (efopt.compress, efopt.error_feedback):
        tx = make(efopt.compressors.identity())
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
        names = list(inspect.signature(tx.update).parameters)
        assert names == ["updates", "state", "params", "extra_args"]


# ------------------------------------------------------------ what it must not do


def test_importing_efopt_imports_no_optional_dependency():
    code = "import sys, efopt; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    ).stdout.split()
    assert {"efopt", "jax", "optax"} <= set(loaded)
    optional = {"flax", "orbax", "sklearn", "matplotlib", "pytest", "tqdm", "nbclient"}
    assert optional.isdisjoint(loaded)


def imports(path):
    """Dotted names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_module_of_others_is_used(path):
    names = [
        *imports(path),
        *re.findall(r"\b(?:jax|jaxlib|optax)[\w.]*", path.read_text()),
    ]
    private = [n for n in names if re.match(r"(jax|jaxlib|optax)\b.*\._(?!_)", n)]
    assert private == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_axes_call_collectives(path):
    names = {n.rpartition(".")[2] for n in imports(path) if n.startswith("jax.")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("lax"):
            names.add(node.attr)
    called = names & COLLECTIVES
    if path == PACKAGE / "workers" / "axes.py":
        assert called >= {"pmean", "all_gather", "all_to_all"}
    else:
        assert called == set()


# Arrows run down only. `hlo` stands apart: of efopt it needs tables and nothing else.
FLOORS = {
    "ground": 0,
    "workers": 1,
    "hlo": 1,
    "codecs": 2,
    "compressors": 3,
    "exchanges": 4,
    "feedback": 5,
    "convex": 6,
    "optimizers": 6,
    "wire": 7,
    "memory": 7,
}


def test_every_room_stands_on_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}
    assert rooms - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path != PACKAGE / "__init__.py"],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_nothing_imports_upward(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        if name.startswith("efopt."):
            other = name.split(".")[1]
            assert other == own or FLOORS[other] < FLOORS[own], name
            assert own != "hlo" or other in ("hlo", "ground"), name
