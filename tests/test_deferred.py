"""Libraries that are kept back: whoever needs them finds them, and whoever does not never pays for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.deferred import DEFERRED


def said(script: str) -> str:
    """Return the last line of what a new interpreter prints."""
    script = f"import sys\nNAMES = {tuple(DEFERRED)}\n{script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_they_are_not_imported_by_an_adapter_and_can_be_needed_after_it() -> None:
    script = """
from fedpeft.deferred import defer, installed, needed
defer()
from peft import LoraConfig, get_peft_model, helpers, import_utils
from torch import nn
from transformers.quantizers import quantizer_torchao
from transformers.utils import is_bitsandbytes_available, is_torchao_available
get_peft_model(nn.Sequential(nn.Linear(3, 4)), LoraConfig(target_modules=["0"], r=2))
asked = (is_bitsandbytes_available, is_torchao_available, import_utils.is_bnb_available,
         import_utils.is_bnb_4bit_available, import_utils.is_torchao_available, import_utils.is_torchao_ge_v0_18_0)
assert not any(each() for each in asked)
assert installed("torchao") and needed() == ("torchao",) and sys.modules["bitsandbytes"] is None
assert not is_bitsandbytes_available()
assert installed("bitsandbytes") and installed("json") and not installed("no_such_library")
defer()
assert all(each() for each in asked)
taken = quantizer_torchao.TorchAoHfQuantizer.get_state_dict_and_metadata.__globals__
print(helpers.bnb.__name__, "flatten_tensor_state_dict" in taken)
"""
    assert said(script) == "bitsandbytes True"


@pytest.mark.parametrize(
    ("before", "hidden"),
    [("json", False), ("flwr.clientapp", False), ("flwr.supernode.cli", True), ("flwr.superlink.cli", True)],
)
def test_flowers_processes_are_our_own_and_a_program_that_imports_fedpeft_is_not(before: str, hidden: bool) -> None:
    script = f"import {before}, fedpeft.registry, importlib.util as u; print([u.find_spec(n) is None for n in NAMES])"
    assert said(script) == str([hidden] * len(DEFERRED))


def test_what_another_package_adds_may_import_them(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        f"import {', '.join(DEFERRED)}\nfrom fedpeft.quantization import NF4 as thing\n"
    )
    (tmp_path / "theirs-1.dist-info").mkdir()
    (tmp_path / "theirs-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (tmp_path / "theirs-1.dist-info" / "entry_points.txt").write_text("[fedpeft.quantizations]\nnf4x = theirs:thing\n")
    for library in DEFERRED:
        (tmp_path / f"{library}.py").touch()  # an empty one, which is quicker
    script = f"""
from fedpeft.deferred import defer
defer()
sys.path.insert(0, {json.dumps(str(tmp_path))})
from fedpeft.quantization import QUANTIZATIONS
try:
    QUANTIZATIONS.find("nf4x")
except Exception as error:
    print(error)
"""
    assert "calls itself 'nf4'" in said(script)  # so that it was imported
