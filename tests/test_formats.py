from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.formats import duration, finite, number, one_line, printable, size


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, "0.2500"),
        (0, "0.0000"),
        (12.5, "12.5000"),
        (3e-7, "3.00e-07"),
        (2.5e300, "2.50e+300"),
        (None, "-"),
        ("x", "-"),
    ],
)
def test_numbers_keep_the_digits_that_tell_something(value: object, expected: str) -> None:
    assert number(value) == expected


def test_a_diverged_loss_is_shown_as_such_but_is_no_number_to_draw() -> None:
    assert number(math.nan) == "nan"
    assert number(math.inf) == "inf"
    assert finite(math.nan) is None
    assert finite(-math.inf) is None
    assert finite(True) is None
    assert finite(3) == 3.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (999, "999 B"), (16424, "16.4 kB"), (3_500_000, "3.5 MB"), (2_340_000_000, "2.34 GB")],
)
def test_sizes_are_decimal(value: int, expected: str) -> None:
    assert size(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(8.25, "8.2 s"), (59.99, "1:00"), (125, "2:05"), (3723, "1:02:03")])
def test_durations_read_as_clocks_do(value: float, expected: str) -> None:
    assert duration(value) == expected


@given(st.text())
def test_foreign_text_stays_on_one_line_and_steers_no_terminal(text: str) -> None:
    shown = one_line(text, 50)
    assert len(shown) <= 50
    assert len(shown.splitlines()) <= 1
    assert shown.isprintable()


def test_control_characters_stay_visible() -> None:
    assert one_line("a\x1b[2J\n  b") == r"a\x1b[2J b"


def test_of_a_text_that_is_too_long_the_wanted_end_is_kept() -> None:
    assert one_line("0123456789", 6) == "012..."
    assert one_line("0123456789", 6, ending=True) == "...789"
    assert one_line("012345", 6, ending=True) == "012345"


@given(st.text())
def test_what_a_model_writes_keeps_its_lines_and_steers_no_terminal(text: str) -> None:
    shown = printable(text)
    assert all(letter.isprintable() or letter in "\n\t\u200c\u200d" for letter in shown)
    assert printable(shown) == shown


def test_lines_and_joined_emojis_stay_and_escapes_are_seen() -> None:
    family = "\U0001f469\u200d\U0001f467"
    assert printable(f"one\n\ttwo {family}") == f"one\n\ttwo {family}"
    assert printable("\x1b[2J\x9b31m\u202e") == r"\x1b[2J\x9b31m\u202e"
