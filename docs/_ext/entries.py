"""Reference entries: a table of names, then every name with its docstring.

``.. entries::`` takes public names, one a line. A reference to any other public name
of the same thing (`efopt.compressors.top_k` for `efopt.top_k`) leads to its entry.
That every public name has one is tested by tests/repository/test_public_api.py.
"""

import importlib
import inspect
import re
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

# Paragraphs of a docstring that say one thing each, and are shown as such.
PROMISES = "Shapes|Payload|Cost|Properties|Placement"


def resolve(name: str) -> Any:
    """What a dotted public name stands for; raises if it stands for nothing."""
    parts = name.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        # An attribute before a module: `efopt.compressors.top_k` is the function.
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


class Entries(Directive):
    """The names in its content: first a table, then one entry each."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        names = [line.strip() for line in self.content if line.strip()]
        lines = [".. autosummary::", "   :nosignatures:", ""]
        lines += [f"   {name}" for name in names]
        for name in names:
            thing = resolve(name)
            kind = "class" if inspect.isclass(thing) else "function"
            lines += ["", f".. auto{kind}:: {name}"]
            if kind == "class":
                lines += ["   :members:", "   :no-inherited-members:"]
        source = self.state.document.current_source
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source), self.content_offset, node)
        return node.children


def set_apart(app, what, name, thing, options, lines: list[str]) -> None:
    """Makes a field of each promise, `Cost: ...`, where a docstring runs them on."""
    del app, what, name, thing, options
    inside = False
    for i, line in enumerate(lines):
        opens = re.match(rf"({PROMISES}): +(.*)", line)
        if opens:
            lines[i] = f":{opens[1]}: {opens[2]}"
        elif inside and line.strip():
            lines[i] = f"  {line}"
        inside = bool(opens) or (inside and bool(line.strip()))


def documented(env) -> dict[int, str]:
    """The entry of every documented thing, by identity."""
    domain = env.get_domain("py")
    return {
        id(resolve(name)): name
        for name, entry in domain.objects.items()
        if name.startswith("efopt.") and not entry.aliased and "module" != entry.objtype
    }


def other_name(app, env, node, contnode):
    """Leads a reference by another public name to the entry."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("efopt"):
        return None
    if inspect.ismodule(shelf := _or_none(target)):
        page = "front" if target == "efopt" else target.rpartition(".")[2]
        return _link(app, node, contnode, f"reference/{page}", "")
    entry = documented(env).get(id(shelf))
    if entry is None:
        return None
    found = env.get_domain("py").objects[entry]
    return _link(app, node, contnode, found.docname, found.node_id)


def _or_none(name: str) -> Any:
    try:
        return resolve(name)
    except (ImportError, AttributeError):
        return None


def _link(app, node, contnode, docname, anchor):
    uri = app.builder.get_relative_uri(node["refdoc"], docname)
    uri += f"#{anchor}" if anchor else ""
    link = nodes.reference("", "", contnode, internal=True, refuri=uri)
    return link


def setup(app) -> dict[str, bool]:
    app.add_directive("entries", Entries)
    app.connect("autodoc-process-docstring", set_apart, priority=400)
    app.connect("missing-reference", other_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
