"""A kind of somebody else's: one file and an entry point, and nothing else to change."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedpeft.adapters.kinds import KINDS, names
from fedpeft.adapters.state import Role, role_of
from fedpeft.config import RunConfig
from fedpeft.errors import ConfigError
from fedpeft.models import load_base
from fedpeft.resident import Resident, resident
from fedpeft.runs import read_config, read_events
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import with_typed_options

Make = Callable[..., RunConfig]
FILE = """
from fedpeft.adapters.kinds import Kind

SHIFTED = Kind(
    name="their-ia3",
    config="IA3Config",
    update="linear",
    parts=("ia3_",),
    rank=(),
    settings={"feedforward_modules": []},
)
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a package that names a kind, for one test."""
    about = tmp_path / "packages" / "their_kind-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kind\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fedpeft.adapters]\ntheir-ia3 = their_kind:SHIFTED\n")
    (about.parent / "their_kind.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(about.parent))
    _look_again()
    yield "their-ia3"
    sys.modules.pop("their_kind", None)
    monkeypatch.undo()
    _look_again()


def _look_again() -> None:
    names.forget()
    role_of.cache_clear()


def test_a_kind_of_another_package_trains_is_averaged_exported_and_reloaded(
    installed: str, text_config: Make, tmp_path: Path
) -> None:
    config = text_config(adapter__kind=installed, strategy__name="fedit", train__learning_rate=0.05)
    run = simulate(config, tmp_path / "run").path
    losses = [event["loss"] for event in read_events(run) if event["event"] == "evaluate"]
    assert losses[-1] < losses[0]
    written = load_file(run / "adapter" / "adapter_model.safetensors")
    own = [name for name in written if ".ia3_l" in name]
    assert own
    assert all(role_of(name) is Role.PARAMETER for name in own)

    home: Resident = resident(with_typed_options(read_config(run)))
    adapted = home.adapted
    assert set(own) <= set(adapted.trained)
    assert not any(torch.equal(written[name], adapted.initial[name]) for name in own)
    adapted.load(written, adapted.scaling)
    loaded = PeftModel.from_pretrained(load_base(home.config, home.folder, home.labels).model, str(run / "adapter"))
    rows = home.data.test.batch(np.arange(6))
    rows.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**rows).logits, adapted.model.eval()(**rows).logits)


def test_it_is_found_by_methods_that_take_any_update_and_refused_by_the_others(
    installed: str, text_config: Make
) -> None:
    assert installed in KINDS.all()
    for method in ("fedit", "local"):
        assert with_typed_options(text_config(adapter__kind=installed, strategy__name=method)).adapter.kind == installed
    with pytest.raises(ConfigError, match=f"'flora' cannot merge.*'{installed}'.*strategy for '{installed}': fedit"):
        with_typed_options(text_config(adapter__kind=installed, strategy__name="flora"))
