"""Formatting of very small and very large numbers for people to read."""

from __future__ import annotations

_PREFIXES = ("", " k", " M", " G", " T", " P", " E", " Z", " Y")


def in_billions(count: float) -> str:
    """Format a number of parameters or tokens: "125 M", "174.6 B" (B for billions)."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{count:,.0f}"


def with_prefix(amount: float, unit: str) -> str:
    """Format an amount with an SI prefix: "588 MFLOP", "314 ZFLOP"."""
    power = 0
    while amount >= 999.5 and power < len(_PREFIXES) - 1:
        amount, power = amount / 1000, power + 1
    return f"{_digits(amount)}{_PREFIXES[power] or ' '}{unit}"


def gibibytes(size: float) -> str:
    """Format bytes as gibibytes: "12.3 GiB"; with two decimals below one: "0.12 GiB"."""
    size /= 2**30
    return f"{size:,.2f} GiB" if size < 1 else f"{size:,.1f} GiB"


def duration(seconds: float) -> str:
    """Format a duration in the largest unit that gives at least one: days, hours, minutes or seconds."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s"


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"
