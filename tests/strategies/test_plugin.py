"""A method of another package: one file, found by its entry point, that simulates, is listed and merges as ours do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedpeft.config import RunConfig
from fedpeft.simulations.simulate import simulate
from fedpeft.strategies import available
from fedpeft.strategies.catalogue import catalogue
from fedpeft.strategies.merging.merge import merge_directories

PLUGIN = '''
"""The mean of A and B, of which a client counts by the root of its rows."""

from dataclasses import replace

from pydantic import Field

from fedpeft.strategies import AdapterStrategy, Capabilities, StrategyOptions
from fedpeft.strategies.algebra.means import weighted_mean


class RootOptions(StrategyOptions):
    power: float = Field(0.5, gt=0, le=1, description="of its rows, by which a client counts")


class RootMean(AdapterStrategy):
    name = "root-mean"
    capabilities = Capabilities(paper="none", sends="Abar, Bbar", exact="no", needs_single_factors=False)
    Options = RootOptions

    def aggregate(self, updates, current, server_round=1):
        rooted = (replace(each, num_examples=each.num_examples**self.options.power) for each in updates)
        return weighted_mean(rooted, current, self.trains_a)
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the method as pip does: a module, and a dist-info that names its entry point."""
    site, facts = tmp_path / "site", tmp_path / "site" / "root_mean-1.0.dist-info"
    facts.mkdir(parents=True)
    (site / "root_mean.py").write_text(PLUGIN)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: root-mean\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[fedpeft.strategies]\nroot-mean = root_mean:RootMean\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("installed")
def test_a_method_of_another_package_simulates_is_listed_and_merges(
    text_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    assert "root-mean" in available()
    (facts,) = [each for each in catalogue(available()) if each["name"] == "root-mean"]
    assert [option["name"] for option in facts["options"]] == ["power"]
    settings = {"strategy__name": "root-mean", "strategy__power": 0.25}
    runs = [simulate(text_config(**settings, run__seed=seed), tmp_path / f"run{seed}").path for seed in (0, 1)]
    merged = merge_directories("root-mean", [run / "adapter" for run in runs], tmp_path / "merged", options={})
    assert merged.method == "root-mean"
    one, two, mean = (
        load_file(folder / "adapter_model.safetensors") for folder in (*(run / "adapter" for run in runs), merged.out)
    )
    for name, tensor in mean.items():
        assert (tensor - (one[name] + two[name]) / 2).abs().max() < 1e-6


def test_it_is_gone_with_its_package() -> None:
    assert "root-mean" not in available()
