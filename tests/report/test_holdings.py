from __future__ import annotations

from fedpeft.report.holdings import partition_view
from tests.report.printing import joined, printed


def test_a_partition_shows_rows_and_labels_of_each_client() -> None:
    clients = [
        {"client": "[b]0", "rows": 5, "labels": {"cat": 5, "dog": 0}, "domains": {"photo": 2, "sketch": 3}},
        {"client": "1", "rows": 12, "labels": {"cat": 2, "dog": 10}, "domains": {"photo": 12, "sketch": 0}},
    ]
    rows = [line.split() for line in printed(partition_view(clients)).splitlines()]
    for expected in (
        ["client", "rows", "cat", "dog"],
        ["[b]0", "5", "5", "."],
        ["1", "12", "2", "10"],
        ["client", "rows", "photo", "sketch"],
        ["1", "12", "12", "."],
    ):
        assert expected in rows
    assert "2 clients, 17 rows: 5 to 12 each, median 8.5" in printed(partition_view(clients))


def test_many_labels_and_many_clients_still_fit_80_columns() -> None:
    labels = {f"a label with a long name {index}": 200 + index for index in range(50)}
    clients = [{"client": f"site-{index}", "rows": 100, "labels": labels} for index in range(500)]
    text = printed(partition_view(clients))
    assert "site-19" in text
    assert "site-20" not in text
    assert "480 clients are not shown" in text
    assert "44 more labels" in joined(text)
    assert "500 clients, 50000 rows" in text


def test_clients_without_labels_show_their_rows() -> None:
    text = printed(partition_view([{"client": "a", "rows": 7}, {"client": "b", "rows": 9}]))
    assert ["a", "7"] in [line.split() for line in text.splitlines()]
