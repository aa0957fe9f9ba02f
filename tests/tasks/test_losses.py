"""The one loss of training, scoring and private training, beside the one that models compute themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedpeft.config import nest, resolve
from fedpeft.resident import Resident
from fedpeft.tasks import TASKS
from fedpeft.tasks.losses import label_losses, mean_loss, next_token_losses


@pytest.fixture(scope="module")
def homes(
    tiny_bert: Path, tiny_llama: Path, tiny_vit: Path, text_csv: Path, pairs_jsonl: Path, image_folder: Path
) -> Callable[[str, str], Resident]:
    """Return ``homes(task, precision)``, a tiny model for the task with its rows."""
    of_task = {
        "sequence-classification": (tiny_bert, text_csv),
        "image-classification": (tiny_vit, image_folder),
        "causal-lm": (tiny_llama, pairs_jsonl),
    }

    def home(task: str, precision: str) -> Resident:
        model, source = of_task[task]
        settings = {"model.name": str(model), "data.source": str(source), "model.task": task, "adapter.rank": 2}
        return Resident(resolve([nest({**settings, "federation.clients": 2, "train.precision": precision})]))

    return home


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("task", TASKS.ours)
def test_the_loss_of_training_is_the_models_own_and_so_are_its_gradients(
    task: str, precision: str, homes: Callable[[str, str], Resident]
) -> None:
    home = homes(task, precision)
    adapted, batch = home.adapted, home.data.train.batch(range(7))
    parameters = adapted.begin_training(adapted.trained)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, parameters))

    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        models_own = adapted.model(**batch).loss
    ours = mean_loss(adapted.task, adapted.model, batch, precision)
    assert ours.dtype == torch.float64
    assert float(ours.detach()) == pytest.approx(float(models_own.detach()), rel=1e-6)
    pairs = list(zip(gradients(ours), gradients(models_own), strict=True))
    assert any(bool(one.any()) for one, _ in pairs)
    if adapted.task.per_token:  # whose logits are computed elsewhere, at fewer positions
        near = {"fp32": 1e-6, "bf16": 0.02}[precision]
        assert all(torch.allclose(one, other, rtol=0, atol=near * float(other.abs().max())) for one, other in pairs)
    else:
        assert all(torch.equal(one, other) for one, other in pairs)  # to the last bit: adapters are what they were


@pytest.mark.parametrize("task", TASKS.ours)
def test_a_rows_loss_is_the_same_alone_and_in_a_batch(task: str, homes: Callable[[str, str], Resident]) -> None:
    home = homes(task, "fp32")
    losses = home.adapted.task.losses
    split = home.data.train

    def of(rows: list[int]) -> tuple[Tensor, Tensor]:
        batch = split.batch(rows)
        labels = batch.pop("labels")
        with torch.no_grad():
            return losses(home.adapted.model(**batch).logits, labels)

    sums, counts = of([0, 1, 2])
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int64)
    for row in range(3):
        (alone,), (count,) = of([row])
        assert float(alone) == pytest.approx(float(sums[row]), rel=1e-5)
        assert int(count) == int(counts[row])


def test_tokens_are_held_against_the_scores_before_them() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[-100, 1, 2, 3], [4, -100, 0, -100]])
    log_p = logits.log_softmax(-1)
    sums, counts = next_token_losses(logits, targets)
    expected = [-(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[0, 2, 3]), -log_p[1, 1, 0]]  # nothing tells a first token
    assert sums.tolist() == pytest.approx([float(value) for value in expected], rel=1e-6)
    assert counts.tolist() == [3, 1]
    # scores of what an adapter puts before the rows' own tokens do not count
    virtual = torch.cat([torch.randn(2, 3, 5), logits], dim=1)
    assert torch.equal(next_token_losses(virtual, targets)[0], sums)


def test_scores_in_sixteen_bits_are_summed_in_more() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums, counts = label_losses(logits, torch.tensor([0, 3, 1]))
    expected = -logits.float().log_softmax(-1)[range(3), [0, 3, 1]]
    assert torch.equal(sums, expected.double())
    assert counts.tolist() == [1, 1, 1]
