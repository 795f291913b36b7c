"""What the library shows, how it documents it, and what it must not touch."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import optax
import pytest
from registry import COMPRESSORS as ROWS

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
COMPRESSORS = {
    name
    for name, f in FUNCTIONS.items()
    if inspect.signature(f).return_annotation is efopt.Compressor
}
SCHEMES = {
    name
    for name, f in FUNCTIONS.items()
    if f.__module__.startswith(
        ("efopt.convex.", "efopt.feedback.", "efopt.optimizers.")
    )
    and inspect.signature(f).return_annotation is not Any
}
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


def test_every_compressor_has_a_row_in_the_registry():
    assert COMPRESSORS == {row.factory.__name__ for row in ROWS}


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


@pytest.mark.parametrize("name", sorted(COMPRESSORS | SCHEMES))
def test_compressors_and_schemes_document_wire_contract_and_source(name):
    published = {row.factory.__name__: row.published for row in ROWS}
    expected = {"Shapes", "Cost", "Properties", "Placement"}
    if published.get(name, True):
        expected.add("References")
    found = sections(FUNCTIONS[name])
    assert expected - found == set()
    if "References" in expected:
        after = doc(FUNCTIONS[name]).split("References:")[1]
        assert "https://" in after


@pytest.mark.parametrize("name", sorted(COMPRESSORS - {"compose", "partition"}))
def test_documented_properties_agree_with_the_contract(name):
    """Of all rows of a factory: what all or none of them hold, and what some do."""
    rows = [row for row in ROWS if row.factory.__name__ == name]
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
def test_only_the_exchanges_call_collectives(path):
    names = {n.rpartition(".")[2] for n in imports(path) if n.startswith("jax.")}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("lax"):
            names.add(node.attr)
    if path.parent.name != "exchange":
        assert names.isdisjoint(COLLECTIVES)


def test_the_exchanges_do_call_collectives():
    text = "".join(p.read_text() for p in (PACKAGE / "exchange").glob("*.py"))
    called = {c for c in COLLECTIVES if f"lax.{c}(" in text}
    assert called >= {"pmean", "all_gather", "all_to_all"}


FLOORS = {
    "compressors": 1,
    "workers": 1,
    "exchange": 2,
    "feedback": 3,
    "estimators": 3,
    "wire": 3,
    "optimizers": 4,
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upward(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own not in FLOORS:
        return
    for name in imports(path):
        if name.startswith("efopt."):
            other = name.split(".")[1]
            assert other == own or FLOORS[other] < FLOORS[own], name
