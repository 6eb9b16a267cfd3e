"""What the chat draws with characters alone: shades over gates, two columns, bars of probabilities."""

if __name__ == "__main__":
    raise SystemExit("Esta pieza no se ejecuta. Los programas: verify_, load_, train_ y chat_phi_engram.py (--help)")

import textwrap
import unicodedata
from itertools import groupby, zip_longest

from engram.console import counted, spanish

SHADES = (None, 194, 157, 120, 83, 46)  # of a closed gate to an open one, in the terminal's 256 colours
NARROW = 60  # columns; with fewer, two texts go one above the other
TOKEN, BAR = 13, 6  # cells of a token and of the longest bar: with a percentage, two of them fit into NARROW columns


def shaded(pieces: list[tuple[str, int]], gates: dict[int, list[float]], facts, columns: int, colour: bool) -> str:
    """Text shaded by the mean of its gates, and under it a line for each layer: a digit where each piece begins; and
    where one of them follows from a fact, a line that marks it with R. Of equal lines of text, one after the other, the
    first stands for all.

    Args:
        pieces: (text, position); gates: {layer: each position's, 0..1}, written in tenths; facts: each position's.
        columns: cells in a row.
    """
    rows, free = [], 0
    for text, position in pieces:
        for i, char in enumerate(text.expandtabs(4)):
            width = 2 if unicodedata.east_asian_width(char) in "WF" else 1  # cells in a terminal
            if width > free:
                rows.append([])
                free = columns - 7
            rows[-1].append((char if char.isprintable() else " ", width, position, i == 0))
            free = 0 if char == "\n" else free - width
    lines, before, again = [], None, 0
    for row in [*rows, None]:
        text = row and "".join(char for char, *_ in row).rstrip()
        if row and text == before:
            again += 1
            continue
        if again:
            lines.append(f"      (la misma línea, {counted(again, 'vez', 'veces')} más)")
        if row is None:
            break
        before, again = text, 0
        lines.append(" " * 6)
        for position, part in groupby(row, key=lambda cell: cell[2]):
            mean = sum(alpha[position] for alpha in gates.values()) / len(gates)
            shade = SHADES[min(int(mean * len(SHADES)), len(SHADES) - 1)]
            text = "".join(char for char, *_ in part)
            lines[-1] += f"\x1b[30;48;5;{shade}m{text}\x1b[0m" if colour and shade else text
        for layer, alpha in gates.items():
            marks = [str(min(int(alpha[at] * 10), 9)) if begins else "." for _, _, at, begins in row]
            lines.append(f"{layer:>5} " + "".join(mark.ljust(width) for mark, (_, width, _, _) in zip(marks, row)))
        spoken = [facts[at - 1] and begins for _, _, at, begins in row]  # a position says the token after it
        if any(spoken):
            marks = "".join("R".ljust(width) if fact else " " * width for fact, (_, width, _, _) in zip(spoken, row))
            lines.append(f"      {marks}".rstrip())
    return "\n".join(lines)


def side_by_side(left: str, right: str, columns: int) -> str:
    """Two texts in two columns, or one above the other where the terminal is narrow."""
    if columns < NARROW:
        return f"{left}\n\n{right}"
    wrap = textwrap.TextWrapper((columns - 4) // 2, tabsize=4, replace_whitespace=False, drop_whitespace=False).wrap
    sides = [[part for line in text.splitlines() for part in wrap(line) or [""]] for text in (left, right)]
    return "\n".join(f"{a:<{(columns - 4) // 2}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))


def bars(likely: list[tuple[str, float]], longest: float) -> str:
    """A line for each (token, probability): the token as Python writes it, a bar, a percentage; 28 cells in all.

    Args:
        longest: the probability of the longest bar, the same for two drawings that are to be compared.
    """
    lines = []
    for token, chance in likely:
        name = repr(token) if token else "(sin texto)"
        name = name if len(name) <= TOKEN else f"{name[: TOKEN - 3]}..."
        bar = "█" * max(1, round(BAR * chance / longest))
        lines.append(f"{name:<{TOKEN}} {bar:<{BAR}} {spanish(100 * chance, 1):>5} %")
    return "\n".join(lines)
