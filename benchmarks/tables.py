"""How figures are shown: with their target beside them, as text or as Markdown."""

import sys
from collections.abc import Iterable, Sequence
from statistics import median

Row = tuple[str, str, str]
Cells = tuple[str, ...]


def ms(value: float) -> str:
    return f"{value:.1f} ms"


def worst(values: dict[str, float]) -> str:
    return ", ".join(ms(values[name]) for name in ("p95", "p99", "max"))


def percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def at_most(value: float, target: float, unit: str) -> str:
    return verdict(f"at most {target:g} {unit}", value <= target)


def verdict(target: str, met: bool) -> str:
    return f"{target}: {'met' if met else 'MISSED'}"


def print_table(title: str, rows: Iterable[Row]) -> None:
    print(f"\n{title}")
    for name, value, target in rows:
        print(f"  {name:<40} {value:<34} {target}".rstrip())
    sys.stdout.flush()


def print_markdown(lines: Sequence[Cells]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width for width in widths]
    for line in (lines[0], rule, *lines[1:]):
        print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |")


def spreads(each: Iterable[Sequence[float]], unit: str, digits: int) -> list[str]:
    """Of each setting the median of its rounds, the lowest and the highest."""
    return [spread(values, unit, digits) for values in each]


def spread(values: Sequence[float], unit: str, digits: int) -> str:
    if not values:
        return ""
    middle, low, high = [f"{value:.{digits}f}" for value in (median(values), min(values), max(values))]
    return f"{middle} ({low} to {high}) {unit}".rstrip()


def listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
