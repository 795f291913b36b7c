"""README and the site's pages: their code runs, their links lead somewhere.

The python blocks of a page are one program. What a block prints is the text block that
follows it, where ``...`` stands for anything. Code of other libraries says so in its
caption, ``for comparison``, and is not run.
"""

import contextlib
import dataclasses
import doctest
import importlib
import io
import re
import shlex
import sys
import types
from pathlib import Path

import jax
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
MADE = {DOCS / "reference" / "support.md"}  # by the site's build
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *(p for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.parts),
]
PAGES = [page for page in PAGES if page not in MADE]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: what stands behind the fence, its lines, and where it begins."""

    info: str
    code: str
    line: int

    @property
    def source(self):
        """Its code, on the lines where it stands in the page."""
        return "\n" * self.line + self.code


def blocks(text):
    found, fence = [], None
    for number, line in enumerate(text.splitlines(), 1):
        opened = re.match(r"(`{3,}|:{3,})(.*)", line)
        if fence is None and opened:
            fence, info, lines, start = opened[1], opened[2].strip(), [], number
        elif fence is not None and line.strip() == fence:
            found.append(Block(info, "\n".join(lines) + "\n", start))
            fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"the block that opens on line {start} is not closed"
    return found


def prose(text):
    """The text without its fenced blocks."""
    return re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.M | re.S)


def name_of(page):
    return str(page.relative_to(REPOSITORY))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def test_blocks_are_found_with_their_lines():
    (block, other) = blocks("a\n```python\nb\n```\nc\n```\nd\n```\n")
    assert block == Block("python", "b\n", 2) and other.info == ""
    assert block.source == "\n\nb\n"


# -------------------------------------------------------------------- code

KNOWN = "python", "text", "sh"
DIRECTIVES = "{eval-rst}", "{toctree}", "{include}", "{note}", "{figure}", "{image}"


@each_page
def test_every_block_is_run_or_marked(page):
    for block in blocks(page.read_text()):
        kind = block.info.split()[0] if block.info else ""
        where = f"{page.name}:{block.line}: {block.info!r}"
        if kind == "{code-block}":
            assert ", for comparison" in block.code.splitlines()[0], where
        else:
            assert kind in (*KNOWN, *DIRECTIVES), where


def printed(block, namespace, page):
    """What a block prints, when it is run after those before it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.source, page, "exec"), namespace)
    return out.getvalue()


def same(expected, got):
    """Whether texts agree, but for white space and what ``...`` leaves open."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(expected, got, flags)


def programs():
    for page in PAGES:
        found = blocks(page.read_text())
        if any(b.info == "python" for b in found):
            yield pytest.param(page, id=name_of(page))


@pytest.mark.slow
@pytest.mark.parametrize("page", list(programs()))
def test_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A module, for classes that ask where they were made.
    program = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", program)
    found = blocks(page.read_text())
    with jax.numpy_rank_promotion("allow"):  # as for any user
        for block, after in zip(found, [*found[1:], None], strict=True):
            if block.info != "python":
                continue
            got = printed(block, program.__dict__, name_of(page))
            said = after.code if after is not None and after.info == "text" else ""
            if got:
                assert same(said, got), f"line {block.line} prints\n{got}"
    assert not list(tmp_path.iterdir()), "a page leaves no files behind"


@each_page
def test_commands_name_what_is_there(page):
    for block in blocks(page.read_text()):
        if block.info != "sh":
            continue
        for word in shlex.split(block.code, comments=True):
            if re.fullmatch(r"(examples|notebooks|docs|tests|\.ci)/[\w./]*", word):
                made = word.startswith("docs/_build")
                assert made or (REPOSITORY / word).exists(), (block.line, word)


@pytest.mark.parametrize("what", ["compressor", "scheme", "exchange"])
def test_a_part_of_ones_own_is_a_file_of_forty_lines(what):
    """Complete, and run by the test above: the first block of the page."""
    first = blocks((DOCS / "howto" / f"write_{what}.md").read_text())[0]
    assert first.info == "python" and "import efopt" in first.code
    assert len(first.code.splitlines()) < 40


# ------------------------------------------------------------------- links and names


@each_page
def test_links_lead_to_files_of_the_repository(page):
    made = DOCS / "notebooks"  # by the site's build, from this folder:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"https?://|mailto:|#", target):
            continue
        path = (page.parent / target.partition("#")[0]).resolve()
        if path.parent == made:
            path = REPOSITORY / "notebooks" / path.name
        assert path.exists() or path in MADE, target
        assert path.is_relative_to(REPOSITORY), target


@each_page
def test_files_that_the_text_names_are_there(page):
    for code in re.findall(r"`([^`\n]+)`", prose(page.read_text())):
        for path in re.findall(r"(?:examples|tests|notebooks|docs)/[\w/.]+\.\w+", code):
            assert (REPOSITORY / path).exists(), path


@pytest.mark.slow
def test_drawings_are_made_by_their_script(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "pictures"))
    make = importlib.import_module("make")
    monkeypatch.setattr(make, "DOCS", tmp_path)
    make.gradient()
    make.two_level()
    for drawing in tmp_path.iterdir():
        assert (DOCS / drawing.name).exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_readme_is_of_two_screens():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 130  # GitHub scrolls code that is wider


def test_readme_shows_the_program_of_the_site():
    """The first program is one and the same: the shortest complete step."""
    readme, index = (
        next(b for b in blocks(page.read_text()) if b.info == "python").code
        for page in (REPOSITORY / "README.md", DOCS / "index.md")
    )
    assert readme == index
