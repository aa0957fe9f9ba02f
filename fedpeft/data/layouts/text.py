"""Raw texts, of which every token is learned."""

from __future__ import annotations

from fedpeft.data.layouts.record import Layout

TEXT = Layout(
    "text",
    "one `text`, without turns",
    {"text": ("text",)},
    keys=("text",),
    taught=frozenset({"text"}),
    implied=False,  # classifiers read the same column
)
