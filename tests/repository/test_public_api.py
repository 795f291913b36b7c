"""What the library shows, how it documents it, and what it must not touch."""

import ast
import functools
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
                # A shelf shows what it imports from other rooms; a file does not.
                room = "efopt." if hasattr(thing, "__path__") else thing.__name__
                own = getattr(value, "__module__", "").startswith(room)
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
COMPOSED |= factories(efopt.optimizers) | factories(efopt.watch)
COMPOSED |= factories(efopt.outer)
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
    alone = {"frozen"}  # stateless, of no workers: feedback/test_frozen.py
    assert ours((*SCHEMES, *OPTIMIZERS)) == set(COMPOSED) - alone | around
    assert ours(OPTIMIZERS) >= set(factories(efopt.optimizers))
    exchanges = {row.name: type(row.make()).__module__ for row in EXCHANGES}
    named = {name for name, m in exchanges.items() if m.startswith("efopt")}
    assert named == set(factories(efopt.exchanges))


# ----------------------------------------------------------------- the reference


def entries():
    """What has an entry in the reference, by the names that stand there."""
    for page in (PACKAGE.parent / "docs" / "reference").glob("*.md"):
        for block in re.findall(r"^\.\. entries::\n\n(.*?)^```$", page.read_text(), SM):
            yield from block.split()


def dotted(name):
    return functools.reduce(getattr, name.split(".")[1:], efopt)


SM = re.S | re.M
SHOWN = {}  # every public thing, by its names
for _name in efopt.__all__:
    _thing = getattr(efopt, _name)
    if not inspect.ismodule(_thing):
        SHOWN[f"efopt.{_name}"] = _thing
        continue
    _room = "efopt." if hasattr(_thing, "__path__") else _thing.__name__
    for _inner, _value in vars(_thing).items():
        _own = (getattr(_value, "__module__", None) or "").startswith(_room)
        if _own and _inner[0] != "_" and not inspect.ismodule(_value):
            SHOWN[f"efopt.{_name}.{_inner}"] = _value


def test_every_public_name_has_an_entry_in_the_reference():
    """Under one of its names. The cure: a line in `docs/reference/<shelf>.md`."""
    named = list(entries())
    assert len(named) == len(set(named)) >= 70
    there = {id(dotted(name)) for name in named}
    missing = [name for name, thing in SHOWN.items() if id(thing) not in there]
    assert missing == [], "say it in docs/reference"


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
    if published.get(name, name != "frozen"):
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


def floors():
    """The picture of the house: the floor of every room, from the ground up."""
    text = (PACKAGE.parent / "docs" / "explanation" / "house.md").read_text()
    (picture,) = re.findall(r"^## Inside$.*?^```text$(.*?)^```$", text, re.M | re.S)
    stories = re.split(r"^-+$", picture, flags=re.M)
    rooms = [re.findall(r"^(\w+)  ", story, re.M) for story in stories]
    return {room: i for i, story in enumerate(reversed(rooms)) for room in story}


FLOORS = floors()
INSIDE = [path for path in SOURCES if path != PACKAGE / "__init__.py"]


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_the_picture_shows_every_room_and_no_other():
    assert FLOORS["ground"] == 0 and max(FLOORS.values()) >= 5
    assert {room_of(path) for path in INSIDE} == set(FLOORS)


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down_as_the_picture_shows(path):
    own = room_of(path)
    for name in imports(path):
        if name.partition(".")[0] == "efopt":
            other = (name.split(".") + [""])[1]
            assert other == own or FLOORS.get(other, 99) < FLOORS[own], name
            # It stands apart: of any program's bytes, with or without the rest.
            assert own != "hlo" or name.startswith(("efopt.hlo", "efopt.ground.tables"))


# -------------------------------------------------------------- names and positions


def test_what_most_programs_need_stands_in_front():
    shelves = [n for n in efopt.__all__ if inspect.ismodule(getattr(efopt, n))]
    rooms = {"compressors", "convex", "exchanges", "feedback", "optimizers", "wire"}
    rooms |= {"outer"}
    assert set(shelves) == rooms | {"checkpoints", "memory", "watch"}
    assert len(efopt.__all__) - len(shelves) <= 28


def test_a_name_that_is_not_in_front_is_told_its_shelf():
    with pytest.raises(AttributeError, match=r"it is `efopt.compressors.qsgd`"):
        efopt.qsgd  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'$"):
        efopt.nothing  # noqa: B018


BY_KEYWORD = {n: f for n, f in FUNCTIONS.items() if hasattr(f, "__wrapped__")}


def test_all_that_have_many_options_take_them_by_keyword():
    few = {"compose", "identity", "partition", "scaled_sign", "frozen", "observe"}
    few |= set(factories(efopt.exchanges))
    made = set(MADE) | set(COMPOSED) | {"accumulate", "per_worker"}
    by_keyword = {f.__name__ for f in BY_KEYWORD.values()}
    assert made - few <= by_keyword


@pytest.mark.parametrize("name", BY_KEYWORD)
def test_an_old_positional_call_is_told_the_keyword(name):
    parameters = inspect.signature(BY_KEYWORD[name]).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    before = [None] * (len(parameters) - len(options))
    said = rf"takes `{options[0]}` by keyword.*{options[0]}='old'"
    with pytest.raises(TypeError, match=said):
        BY_KEYWORD[name](*before, "old")
