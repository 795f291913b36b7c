"""What waits for what: the arguments that collectives and results depend on."""

from efopt.hlo.program import Body, Program, names
from efopt.hlo.read import collectives


def inputs_of_collectives(text: str) -> dict[str, frozenset[int]]:
    """The arguments that each collective depends on, by its name in the text.

    One that depends on neither parameters nor data of a step may run beside all that is
    computed of these. Compile with ``keep_unused=True``, lest arguments be numbered
    anew.

    Args:
      text: ``jax.jit(f, keep_unused=True).lower(...).compile().as_text()``.

    Returns:
      The places of arguments among all leaves of all arguments.
    """
    program = Program.parse(text)
    entry = program.entry()
    where = {
        name: computation
        for computation, body in program.bodies.items()
        for name in body
    }
    found: dict[str, frozenset[int]] = {}
    for collective in collectives(program):
        computation, name = where[collective.name], collective.name
        while computation != entry:  # what calls it gives it its arguments
            computation, name = _caller(program, computation)
        found[collective.name] = _arguments(name, program.bodies[computation])
    return found


def inputs_of_results(text: str) -> list[frozenset[int]]:
    """The arguments that each result of a program depends on, as above.

    Args:
      text: As for :func:`inputs_of_collectives`, of a program with several results.
    """
    program = Program.parse(text)
    body = program.bodies[program.entry()]
    root = next(x for x in body.values() if x["root"])
    return [_arguments(name, body) for name in names(root["operands"])]


def _caller(program: Program, called: str) -> tuple[str, str]:
    for computation, body in program.bodies.items():
        for name, instruction in body.items():
            if called in [inner for inner, _ in program.called(instruction)]:
                return computation, name
    raise ValueError(f"nothing calls the computation {called!r}.")


def _arguments(name: str, body: Body) -> frozenset[int]:
    seen, left, found = {name}, [name], set()
    while left:
        instruction = body[left.pop()]
        if instruction["opcode"] == "parameter":
            found.add(int(instruction["operands"]))
            continue
        for operand in names(instruction["operands"]):
            if operand in body and operand not in seen:
                seen.add(operand)
                left.append(operand)
    return frozenset(found)
