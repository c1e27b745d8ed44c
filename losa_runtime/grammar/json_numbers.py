"""Regular expressions for JSON numbers, and for the integers between two bounds."""

from __future__ import annotations

INTEGER = "-?(?:0|[1-9][0-9]*)"
NUMBER = rf"{INTEGER}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{{1,2}})?"


def integer_range(low: int | None, high: int | None) -> str:
    """The decimal integers from `low` to `high` (None: no bound), without leading zeros; -0 is not among them."""
    parts = []
    if low is None or low < 0:
        least, most = (1 if high is None or high >= 0 else -high), None if low is None else -low
        parts.append(f"-{_natural(least, most)}")
    if high is None or high >= 0:
        parts.append(_natural(max(0, low or 0), high))
    return f"(?:{'|'.join(parts)})"


def _natural(low: int, high: int | None) -> str:
    """Natural numbers from low to high."""
    if high is None:
        digits = len(str(low))
        longer = rf"[1-9][0-9]{{{digits},}}"
        return f"(?:{_natural(low, 10**digits - 1)}|{longer})"
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        parts += _same_length(str(first), str(last))
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _same_length(low: str, high: str) -> list[str]:
    """Alternatives for the numbers between two of the same number of digits."""
    if not low:
        return [""]
    if low == "0" * len(low) and high == "9" * len(high):
        return [_digits(len(low))]
    if low[0] == high[0]:
        return [low[0] + rest for rest in _same_length(low[1:], high[1:])]
    parts = [low[0] + rest for rest in _same_length(low[1:], "9" * (len(low) - 1))]
    if int(high[0]) - int(low[0]) > 1:
        parts.append(f"[{int(low[0]) + 1}-{int(high[0]) - 1}]{_digits(len(low) - 1)}")
    return parts + [high[0] + rest for rest in _same_length("0" * (len(high) - 1), high[1:])]


def _digits(count: int) -> str:
    return "" if count == 0 else "[0-9]" if count == 1 else f"[0-9]{{{count}}}"
