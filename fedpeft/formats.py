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


JOINERS = "\u200c\u200d"  # which print nothing, and which Persian and families of emojis cannot be written without


def printable(text: str, but: str = f"\n\t{JOINERS}") -> str:
    r"""Show what would steer a terminal rather than be read in it, such as control characters, as ``\x1b``.

    Parameters
    ----------
    text : str
        Foreign: what models, rows and other machines write.
    but : str
        What is left as it is though it does not print, such as line breaks.
    """
    return "".join(char if char.isprintable() or char in but else ascii(char)[1:-1] for char in text)


def one_line(value: object, limit: int = 300, *, ending: bool = False) -> str:
    r"""Put foreign text on one line: white space is folded, control characters are shown as ``\x1b``.

    Client ids and error messages come from other machines, and must neither break lines nor steer a terminal. Of a text
    that is too long the beginning is kept, or the `ending`.
    """
    text = printable(" ".join(str(value).split()), but="")
    if len(text) <= limit:
        return text
    return f"...{text[3 - limit :]}" if ending else f"{text[: limit - 3]}..."
