from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fedpeft.simulations.grids.worker import Worker, environment, load_app


def test_the_worker_module_loads_nothing_that_reads_the_environment_first() -> None:
    code = "import sys, fedpeft.simulations.grids.worker; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_workers_without_a_gpu_of_their_own_see_none() -> None:
    assert environment(2, gpu=False)["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment(2, gpu=True)  # Ray sets it to the GPUs that are the worker's


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("simulated_clients", ValueError),
        ("simulated_clients:", ValueError),
        ("simulated_clients:not_an_app", TypeError),
        ("simulated_clients:missing", AttributeError),
        ("no_such_module:app", ModuleNotFoundError),
    ],
)
def test_a_name_that_leads_to_no_client_app_is_an_error_that_says_so(name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=name.split(":")[0]):
        load_app(name)


def test_a_worker_that_cannot_import_its_app_says_why() -> None:
    trace = Worker("no_such_module:app", torch.get_num_threads(), {}).load()
    assert trace is not None
    assert "No module named 'no_such_module'" in trace
