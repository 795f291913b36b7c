"""Plain-text tables, as every report prints them."""


def table(rows: list[list[str]], alignment: str) -> list[str]:
    """Lines of a table; ``alignment`` has ``<`` or ``>`` for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{{:{a}{w}}}" for a, w in zip(alignment, widths, strict=True)]
    lines = ("  ".join(map(str.format, formats, row)) for row in rows)
    return [line.rstrip() for line in lines]
