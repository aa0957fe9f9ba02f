"""Numbers, sizes, times and foreign text in few characters, the same in terminals, plots and pages."""

from __future__ import annotations

import math

NONE = "-"


def finite(value: object) -> float | None:
    """Return a number that can be drawn or compared; None for anything else, NaN and infinity included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: object) -> str:
    """Write a score or a loss: four decimals where they tell something, else three digits and an exponent."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # a diverged loss is news, not a gap
    known = finite(value)
    if known is None:
        return NONE
    return f"{known:.2e}" if known != 0 and not 1e-3 <= abs(known) < 1e5 else f"{known:.4f}"


def size(count: object) -> str:
    """Write a number of bytes in decimal units."""
    known = finite(count)
    if known is None:
        return NONE
    for limit, unit in ((1e3, "B"), (1e6, "kB"), (1e9, "MB")):
        if known < limit:
            return f"{known:.0f} B" if unit == "B" else f"{known * 1e3 / limit:.1f} {unit}"
    return f"{known / 1e9:.2f} GB"


def duration(seconds: object) -> str:
    """Write a time span: ``8.3 s``, ``2:05`` or ``1:02:03``."""
    known = finite(seconds)
    if known is None:
        return NONE
    if known < 59.95:
        return f"{known:.1f} s"
    minutes, rest = divmod(round(known), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(value: object, limit: int = 300) -> str:
    r"""Put foreign text on one line: white space is folded, control characters are shown as ``\x1b``.

    Client ids and error messages come from other machines, and must neither break lines nor steer a terminal.
    """
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
