"""What the site takes from elsewhere at every build: notebooks, and the support matrix.

The matrix says what the tests say: a mark stands where a case of that name is among the
tests that pytest collects, so that nothing can be claimed that is not tested.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = "test_schemes_and_optimizers.py", "topology", "compressors"
# Columns: what is claimed, and the test whose cases claim it.
COMPRESSORS = {
    "contract": "test_contract.py::test_update_keeps_structure_shapes_and_dtypes",
    "oracle": "test_contract.py::test_every_(?:step_is_that_of_the_oracle|coordinate)",
    "loses nothing": "test_contract.py::test_error_feedback_loses_nothing",
    "global": r"test_entrances.py::test_parameters\w*\[\S+-global\]",
    "nested": r"test_entrances.py::test_parameters\w*\[\S+-nested\]",
    "manual": r"test_entrances.py::test_parameters\w*\[\S+-manual\]",
}
SCHEMES = {
    "one worker": "test_a_step_changes_the_parameters_and_stays_finite",
    "`shard_map` Auto and Explicit, `pmap`, `vmap`": (
        "test_workers_agree_and_differ_however_they_are_mapped"
    ),
    "second mesh axis": "test_along_a_second_axis_every_device_has_the_same_updates",
    "stored and restored": "test_a_state_that_was_stored_goes_on",
    "`memory_report`": "test_a_memory_report_leaves_nothing_out",
    "refuses summed gradients": "test_gradients_already_summed_over_workers",
}
ENTRANCES = "global", "nested", "manual"


def collected() -> list[str]:
    """Ids of all tests over the registry's rows, slow ones too."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n0", "-m", ""]
    command += ["-p", "no:cacheprovider", *(f"tests/{name}" for name in FILES)]
    # Whoever builds a site may have jax on other devices: names need none.
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return [line for line in done.stdout.splitlines() if "::" in line]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def marks(tests: list[str], claims: Iterable[str], name: str) -> list[str]:
    """A mark for every claim that has a case of this name."""
    found = []
    for claim in claims:
        ours = [t for t in tests if re.search(claim, t)]
        if not ours:
            raise RuntimeError(f"no test is called {claim}")
        case = rf"[\[-]{re.escape(name)}[\]-]"
        found.append("✓" if any(re.search(case, t) for t in ours) else "")
    return found


def by_entrance(tests: list[str], pattern: str) -> list[list[str]]:
    """A row for every case of a test, with a mark for each entrance it comes from."""
    pairs = {m.groups() for t in tests if (m := re.search(pattern, t))}
    return [
        [f"`{case}`", *("✓" if (case, e) in pairs else "" for e in ENTRANCES)]
        for case in sorted({case for case, _ in pairs})
    ]


def matrix() -> str:
    """The page, in Markdown."""
    import registry

    tests = collected()

    def factory(row):
        shelf = row.factory.__module__.split(".")
        ours = shelf[0] == "efopt"
        return f"`{row.factory.__name__}`" + ("" if ours else " (an example)")

    compressors = [
        [f"`{r.name}`", factory(r), ", ".join(f"`{e}`" for e in r.exchanges)]
        + marks(tests, COMPRESSORS.values(), r.name)
        for r in registry.COMPRESSORS
    ]
    schemes = [
        [f"`{r.name}`", factory(r), *marks(tests, SCHEMES.values(), r.name)]
        for r in (*registry.SCHEMES, *registry.OPTIMIZERS)
    ]
    trains = r"scheme_trains\w*\[(\w+)-(\w+)\]"
    meshes = r"every_mesh\w*\[(\S+-(?:auto|explicit))-\S+-(\w+)\]"
    return f"""# Support matrix

Made at every build of this page from the tests: a mark stands where the suite has a
case of that name, and the suite has to pass. Rows are those of `tests/registry.py`. An
empty field says that there is no such test, for example because the method has no form
for it.

## Compressors and exchanges

Entrances are those of a [two-level mesh](../explanation/two_levels.md). Each is tested
with every exchange in the third column, all others are refused by name.

{table(["row", "factory", "exchanges", *COMPRESSORS], compressors)}
## Schemes and optimizers

{table(["row", "factory", *SCHEMES], schemes)}
## Schemes on a two-level mesh

Parameters after some steps are those of shards that are cut and compressed by hand.

{table(["case", *ENTRANCES], by_entrance(tests, trains))}
## Meshes

Axes with their sizes, the slow one, and the type of all.

{table(["mesh", *ENTRANCES], by_entrance(tests, meshes))}"""


def write(app) -> None:
    source = Path(os.environ.get("EFOPT_NOTEBOOKS", REPOSITORY / "notebooks"))
    folder = Path(app.srcdir) / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        shutil.copy(source / path.name, folder)  # each has to be there
    page = Path(app.srcdir) / "reference" / "support.md"
    text = matrix()
    if not page.exists() or page.read_text() != text:
        page.write_text(text)


def setup(app) -> dict[str, bool]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
