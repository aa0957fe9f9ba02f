"""FedAvg over users whose rows are tensors, a process a core, evaluation shared among the processes."""

import json
import os
import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.central_evaluation import CentralEvaluationCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from benchmarks.peer_app.task import VARIABLE, load_model, load_rows, settings

ACCURACY = "accuracy"


class Classifier(torch.nn.Module):
    """What pfl asks of a model: a loss to minimise, and metrics."""

    def __init__(self):
        super().__init__()
        self.inner = load_model()

    def _run(self, input_ids, attention_mask, labels):
        longest = int(attention_mask.sum(1).max())
        return self.inner(input_ids=input_ids[:, :longest], attention_mask=attention_mask[:, :longest], labels=labels)

    def loss(self, input_ids, attention_mask, labels):
        self.train()
        return self._run(input_ids, attention_mask, labels).loss

    @torch.no_grad()
    def metrics(self, input_ids, attention_mask, labels):
        self.eval()
        right = self._run(input_ids, attention_mask, labels).logits.argmax(-1) == labels
        return {ACCURACY: Weighted(int(right.sum()), len(labels))}


class Passes(Dataset):
    """A user's rows, of which a round takes shuffled passes."""

    def iter(self, batch_size):
        ids, mask, labels = self.raw_data
        for _ in range(settings()["local_steps"]):
            order = torch.randperm(len(ids))
            for rows in order.split(batch_size):
                yield ids[rows], mask[rows], labels[rows]


class Told(CentralEvaluationCallback):
    """Scores each round, and says it on the first process."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        _, metrics = self._eval(model)  # pfl itself leaves the first round out
        scores = [float(value.overall_value) for name, value in metrics if ACCURACY in str(name)]
        if pytorch_ops.distributed.global_rank == 0:
            print(json.dumps({"event": "evaluate", "round": central_iteration + 1, "accuracy": scores[0]}), flush=True)
        return False, Metrics()


def main():
    given = settings()
    torch.manual_seed(given["seed"])
    np.random.seed(given["seed"])  # noqa: NPY002  pfl draws its cohorts from it
    torch.set_num_threads(max(1, given["cores"] // int(os.environ.get("WORLD_SIZE", 1))))
    classifier = Classifier()
    trained = [p for p in classifier.parameters() if p.requires_grad]
    model = PyTorchModel(
        classifier,
        lambda parameters, lr: torch.optim.AdamW([p for p in parameters if p.requires_grad], lr, weight_decay=0.0),
        torch.optim.SGD(trained, lr=1.0),
    )
    users = range(len(given["partitions"]))
    rows = {user: load_rows(user).tensors for user in users}
    training = FederatedDataset(
        lambda user: Passes(rows[user], user_id=user),
        get_user_sampler("minimize_reuse", list(users)),
        user_id_to_weight=dict.fromkeys(users, 1),  # all take as many steps
    )
    evaluation = Told(Dataset(load_rows(None).tensors), NNEvalHyperParams(local_batch_size=64))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=given["rounds"],
            evaluation_frequency=1000,  # of users' own rows, which fedpeft does not score either
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        SimulatedBackend(training, training, postprocessors=[WeightByDatapoints()]),
        model,
        NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=given["local_steps"],
            local_learning_rate=given["learning_rate"],
            local_batch_size=given["batch_size"],
            local_max_grad_norm=None,
        ),
        callbacks=[evaluation],
    )


if __name__ == "__main__":
    os.environ[VARIABLE] = os.path.abspath(sys.argv[1])
    main()
