"""Fits a new head on frozen features, without any backward pass through the backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thintune.data import Split

_IMAGES = 8192  # features of this many images are enough for a linear map and stay small


@torch.no_grad()
def head_features(model: nn.Module, head: nn.Module, split: Split, batch_size: int, device: str) -> Tensor:
    """Inputs of the head for the first images of a split.

    Returns:
        (n, D) with n at most 8192.
    """
    found: list[Tensor] = []
    # a copy: the class token is a view, which would keep what all tokens left
    handle = head.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].detach().clone()))
    model.eval()
    try:
        count = min(len(split), _IMAGES)
        for start in range(0, count, batch_size):
            model(split.images(torch.arange(start, min(start + batch_size, count))).to(device))
    finally:
        handle.remove()
    return torch.cat(found)


def fit_head_(model: nn.Module, head: nn.Linear, split: Split, batch_size: int, device: str = "cpu") -> None:
    """Logistic regression on standardised features, its solution written into the head.

    Minimises the mean cross entropy plus 1e-3/2 times the squared weights by L-BFGS from zero; deterministic.

    Args:
        model: holds the head; its backbone is not changed.
        head: D to classes.
        split: labelled images.
        batch_size: images of one forward pass.
        device: of the model.
    """
    features = head_features(model, head, split, batch_size, device).float()
    labels = split.labels[: len(features)].to(device)
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    features = features.sub_(mean).div_(std)
    weight = torch.zeros(head.out_features, features.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(head.out_features, device=device, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + 5e-4 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    with torch.no_grad():
        scaled = weight / std
        head.weight.copy_(scaled)
        if head.bias is not None:
            head.bias.copy_(bias - scaled @ mean)
