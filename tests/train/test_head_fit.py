"""A head fitted on frozen features."""

import torch
import torch.nn.functional as F
from torch import nn

from thintune.train.evaluate import evaluate
from thintune.train.head import fit_head_


class Clusters:
    """Points around one corner a class, (n, 6); far from zero and of unequal scales."""

    def __init__(self, n, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 4
        corners = 3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
        noise = torch.randn(n, 6, generator=generator)
        self._images = (corners[self.labels] + noise) * torch.tensor([1e-2, 1, 1, 10, 1, 1]) + 50

    def __len__(self):
        return len(self.labels)

    def images(self, indices):
        return self._images[indices]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 4))


def test_the_head_separates_what_the_features_separate():
    model = network()
    frozen = model[0].weight.clone()
    assert evaluate(model, Clusters(200, seed=1), 32).accuracy < 0.5
    fit_head_(model, model[2], Clusters(200), 32)
    assert evaluate(model, Clusters(200, seed=1), 32).accuracy > 0.95
    assert torch.equal(model[0].weight, frozen) and all(p.grad is None for p in model.parameters())


def test_the_fit_is_a_minimum_of_the_stated_objective():
    model, split = network(), Clusters(120)
    fit_head_(model, model[2], split, 50)
    with torch.no_grad():
        features = model[0](split.images(torch.arange(120))).double()
    mean, std = features.mean(0), features.std(0, correction=0)
    weight = (model[2].weight.detach().double() * std).requires_grad_()
    bias = (model[2].bias.detach().double() + model[2].weight.detach().double() @ mean).requires_grad_()
    loss = F.cross_entropy(F.linear((features - mean) / std, weight, bias), split.labels)
    loss = loss + 5e-4 * weight.square().sum()
    loss.backward()
    assert 1e-4 < loss < 0.5
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-3


def test_the_batch_size_does_not_matter_and_the_fit_is_deterministic():
    heads = []
    for size in (7, 7, 120):
        model = network()
        fit_head_(model, model[2], Clusters(120), size)
        heads.append(model[2].weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert (heads[0] - heads[2]).abs().max() < 1e-2 * heads[0].abs().max()


def test_an_empty_split_is_not_measured():
    found = evaluate(network(), Clusters(0), 8)
    assert found.accuracy is None and found.images_per_s is None
