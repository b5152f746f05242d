"""Which linear layers of a model are converted."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from thintune.config import ThinConfig
from thintune.errors import ConversionError, nearest
from thintune.nn import CompressedLinear, ThinLinear


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name equals a pattern, lies under it, or fits it as a shell pattern."""
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def select(model: nn.Module, config: ThinConfig) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Finds the layers to convert.

    Args:
        model: any module.
        config: its include and exclude patterns.

    Returns:
        The chosen layers by name, in the model's order, and for every other linear layer the reason it is left.

    Raises:
        ConversionError: a pattern that matches nothing, or no layer left to convert.
    """
    chosen: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear | ThinLinear)}
    if any(isinstance(m, ThinLinear | CompressedLinear) for m in linears.values()):
        raise ConversionError("the model has thin layers already; merge_ it first to convert it anew.")
    if "" in linears:
        raise ConversionError("the model is itself a linear layer; wrap it, as in torch.nn.Sequential(model).")
    _check_patterns(linears, [*config.include_modules, *config.exclude_modules])
    owners = _owners(model)
    first: dict[int, str] = {}
    for name, module in linears.items():
        assert isinstance(module, nn.Linear)
        others = [owner for owner, key in owners.get(id(module.weight), ()) if key != id(module)]
        reason = _reason(name, module, config)
        if reason is None and others:
            reason = f"shares its weight with {others[0]}"
        if reason is None and id(module) in first:
            reason = f"is the same module as {first[id(module)]}"
        first.setdefault(id(module), name)
        if reason is None:
            chosen[name] = module
        else:
            skipped[name] = reason
    if not chosen:
        raise ConversionError(
            f"no linear layer matched: {len(linears)} in the model, include_modules={list(config.include_modules)}, "
            f"exclude_modules={list(config.exclude_modules)}; loosen the patterns."
        )
    return chosen, skipped


def _owners(model: nn.Module) -> dict[int, list[tuple[str, int]]]:
    """Identity of each parameter -> name and identity of every module that holds it, a tied embedding too."""
    owners: dict[int, list[tuple[str, int]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, id(module)))
    return owners


def _reason(name: str, module: nn.Module, config: ThinConfig) -> str | None:
    if type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, whose owner may read its weight directly"
    if config.include_modules and not any(matches(name, p) for p in config.include_modules):
        return "not in include_modules"
    for pattern in config.exclude_modules:
        if matches(name, pattern):
            return f"excluded by {pattern!r}"
    return None


def _check_patterns(names: Iterable[str], patterns: Iterable[str]) -> None:
    names = list(names)
    parts = {n.rsplit(".", k)[0] for n in names for k in range(n.count(".") + 1)} | set(names)
    wrong = [p for p in patterns if not any(matches(n, p) for n in names)]
    if wrong:
        described = "; ".join(f"{p!r} matches no linear layer.{nearest(p, parts)}" for p in wrong)
        raise ConversionError(f"include_modules/exclude_modules: {described}")


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another wherever the model holds that one, and gives it its mode."""
    new.train(old.training)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is old:
                setattr(parent, child, new)


def trains(layer: nn.Module) -> tuple[bool, bool]:
    """Whether the weight and the bias of a dense or thin linear layer take gradients, be it in another form."""
    weight = next(w for n in ("update", "left", "weight") if (w := getattr(layer, n, None)) is not None)
    bias = getattr(layer, "bias", None)
    return weight.requires_grad, bias is not None and bias.requires_grad


def freeze_as_(new: nn.Module, weight: bool, bias: bool) -> None:
    """Freezes what stands for the weight, and the bias, where the replaced layer was frozen."""
    for name, parameter in new.named_parameters():
        if not (bias if name == "bias" else weight):
            parameter.requires_grad_(False)


def put_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a layer by one that stands for it, with the old one's mode and, for what it trains, its freezing."""
    freeze_as_(new, *trains(old))
    replace_(model, old, new)
