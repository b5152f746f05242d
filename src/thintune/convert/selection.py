"""Which linear layers of a model are converted."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from thintune.config import ThinConfig
from thintune.errors import ConversionError, nearest
from thintune.nn import ThinLinear


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
    owners: dict[int, str] = {}
    linears = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear | ThinLinear)}
    if any(isinstance(m, ThinLinear) for m in linears.values()):
        raise ConversionError("the model has thin layers already; merge_ it first to convert it anew.")
    _check_patterns(linears, [*config.include_modules, *config.exclude_modules])
    for name, module in linears.items():
        reason = _reason(name, module, config)
        if reason is None and id(module.weight) in owners:
            reason = f"shares its weight with {owners[id(module.weight)]}"
        owners.setdefault(id(module.weight), name)
        if reason is None:
            assert isinstance(module, nn.Linear)
            chosen[name] = module
        else:
            skipped[name] = reason
    if not chosen:
        raise ConversionError(
            f"no linear layer matched: {len(linears)} in the model, include_modules={list(config.include_modules)}, "
            f"exclude_modules={list(config.exclude_modules)}; loosen the patterns."
        )
    return chosen, skipped


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
