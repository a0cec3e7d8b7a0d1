"""The ranks' shares of the test data add up to the whole, and looking changes nothing."""

import math

import torch
from torch import nn

from kfdist.comm.communicator import Communicator
from kfdist.data import DataSet, Examples, feed
from kfdist.data.feed import Serving, make_feed
from kfdist.data.objective import Classification
from kfdist.data.sampler import Position, Sampler
from kfdist.training.evaluation import Evaluation, evaluate


class Share(Communicator):
    """One of several ranks, alone: what it would contribute to the sums."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(None)
        self.rank, self.world_size = rank, world_size


def test_shares_add_up_and_the_model_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(feed, "_TEST_BATCH", 3)
    torch.manual_seed(0)
    examples = Examples(inputs=torch.randn(23, 5), labels=torch.randint(0, 4, (23,)))
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    cpu = torch.device("cpu")

    def share(rank: int, world_size: int) -> Evaluation:
        sampler = Sampler(examples=23, batch_size=1, world_size=world_size, seed=0)
        data = DataSet(train=examples, test=examples, classes=4)
        batches = make_feed(data, Serving(sampler=sampler, worker_rank=rank, device=cpu), Position()).evaluation()
        return evaluate(model, batches, data.objective, Share(rank, world_size), cpu)

    whole, shares = share(0, 1), [share(rank, 3) for rank in range(3)]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert [share.examples for share in shares] == [8, 8, 7]
    assert abs(sum(share.loss * share.examples for share in shares) / 23 - whole.loss) < 1e-6
    assert round(sum(share.metrics["accuracy"] * share.examples for share in shares)) == round(
        whole.metrics["accuracy"] * 23
    )
    with torch.no_grad():
        logits = model.eval()(examples.inputs)
    assert abs(whole.loss - nn.functional.cross_entropy(logits, examples.labels).item()) < 1e-5
    assert whole.metrics["accuracy"] == (logits.argmax(1) == examples.labels).double().mean().item()


def test_a_part_that_is_frozen_in_evaluation_stays_there():
    model = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)))
    model[1].eval()
    examples = Examples(inputs=torch.randn(3, 5), labels=torch.tensor([0, 1, 2]))
    data = DataSet(train=examples, test=examples, classes=4)
    batches = [(examples.inputs, examples.labels)]
    evaluate(model, batches, data.objective, Communicator(None), torch.device("cpu"))
    assert [module.training for module in model.modules()] == [True, True, False, False, False]


def test_an_evaluation_of_nothing_has_no_mean():
    objective = Classification()
    found = evaluate(nn.Linear(5, 4), [], objective, Communicator(None), torch.device("cpu"))
    assert found.examples == 0 and math.isnan(found.loss) and math.isnan(found.metrics["accuracy"])
