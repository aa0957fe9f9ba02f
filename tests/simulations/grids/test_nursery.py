from __future__ import annotations

import os

import pytest

from fedpeft.simulations.grids import nursery


def test_a_process_of_another_user_lives_and_one_that_is_gone_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, lives in ((None, True), (PermissionError(), True), (ProcessLookupError(), False)):

        def kill(pid: int, number: int, error: Exception | None = error) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr(os, "kill", kill)
        assert nursery._lives(1) == lives
