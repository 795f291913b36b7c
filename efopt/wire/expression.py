"""A compressor written as text, as in a shell, without running it as a program."""

import ast
import inspect
from typing import Any

from efopt import compressors
from efopt.codecs.compressor import Compressor

FACTORIES = {
    name: thing
    for name, thing in vars(compressors).items()
    if inspect.isfunction(thing)
    and inspect.signature(thing).return_annotation is Compressor
}


LONGEST = 4096  # characters of an expression, far above any that is meant


def compressor(text: str) -> Compressor:
    """Reads ``"scaled_sign(1024)"`` or ``"compose(top_k(k=64), qsgd(levels=7))"``.

    Only calls of efopt's compressors on Python literals and on one another are read.
    """
    if len(text) > LONGEST:
        raise ValueError(
            f"cannot read a compressor of {len(text):,} characters; at most {LONGEST:,}"
        )
    try:
        made = _read(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read the compressor {text!r}: {error}") from error
    except (RecursionError, MemoryError) as error:
        shown = text[:40] + "..."
        raise ValueError(f"the compressor {shown!r} is too deep to be read") from error
    if not isinstance(made, Compressor):
        raise ValueError(f"{text!r} is no compressor; write `name(options)`.")
    return made


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).removeprefix("efopt.")
        if name not in FACTORIES:
            raise ValueError(f"no `{name}`; there are {', '.join(sorted(FACTORIES))}")
        if any(k.arg is None for k in node.keywords):
            raise ValueError("`**` is not read")
        options = {str(k.arg): _read(k.value) for k in node.keywords}
        return FACTORIES[name](*map(_read, node.args), **options)
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_read, node.values), strict=True))
    return ast.literal_eval(node)
