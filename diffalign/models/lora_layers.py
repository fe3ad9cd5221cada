"""Choose the layers of a LoRA: by endings, a regular expression, and the numbers of their blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from diffalign.config.sections import LoraConfig

SHOWN = 12


def select_layers(
    module: nn.Module, config: LoraConfig, defaults: tuple[str, ...], idle: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the target and excluded names for peft's configuration.

    Args:
        module: The denoiser.
        config: Targets, patterns and blocks.
        defaults: Targets of the family.
        idle: Full names of layers to leave out.

    Raises:
        ValueError: A target, expression, block or pattern matches no layer.
    """
    wanted = config.targets or defaults
    names = [name for name, _ in module.named_modules()]
    if config.layers is None:
        if missing := [t for t in wanted if not any(named(n, t) for n in names)]:
            raise ValueError(
                f"lora.targets: no layer is named {', '.join(missing)}; layers of a block: {_linear(module)}"
            )
        chosen = [name for name in names if any(named(name, t) for t in wanted)]
    else:
        chosen = _matching(module, config.layers)
    if config.blocks is not None:
        chosen = _in_blocks(chosen, config.blocks)
    chosen = [name for name in chosen if name not in idle]
    _check_patterns(chosen, {"lora.rank_pattern": config.rank_pattern, "lora.alpha_pattern": config.alpha_pattern})
    if config.layers is None and config.blocks is None:
        return sorted(wanted), [name for name in idle if any(named(name, t) for t in wanted)]
    return sorted(chosen), namesakes(module, chosen)


def named(layer: str, target: str) -> bool:
    """Tell whether ``target`` is a layer's name or its end."""
    return layer == target or layer.endswith("." + target)


def namesakes(module: nn.Module, chosen: Collection[str]) -> list[str]:
    """List layers whose names end in that of a chosen one, and that peft would adapt with it."""
    ends = set(chosen)
    return [
        name
        for name, _ in module.named_modules()
        if name not in ends and any(name.split(".", i)[-1] in ends for i in range(1, name.count(".") + 1))
    ]


def _matching(module: nn.Module, expression: str) -> list[str]:
    pattern = _compiled("lora.layers", expression)
    found = [n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and pattern.fullmatch(n)]
    if not found:
        raise ValueError(f"lora.layers: {expression!r} matches no layer; layers of a block: {_linear(module)}")
    return found


def _compiled(field: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{field}: {expression!r} is no regular expression ({error}): correct it") from error


def _in_blocks(names: list[str], blocks: tuple[int, ...]) -> list[str]:
    """Keep the layers whose first number is one of ``blocks``. ValueError: a block has no such layer."""
    numbers: dict[str, int] = {}
    for name in names:
        if first := next((part for part in name.split(".") if part.isdigit()), None):
            numbers[name] = int(first)
    if missing := sorted(set(blocks) - set(numbers.values())):
        known = sorted(set(numbers.values()))
        raise ValueError(f"lora.blocks: no adapted layer is in block {missing[0]}; blocks: {_few(map(str, known))}")
    return [name for name in names if numbers.get(name) in blocks]


def _check_patterns(chosen: Collection[str], patterns: Mapping[str, Mapping[str, Any]]) -> None:
    for field, table in patterns.items():
        for key in table:
            pattern = _compiled(field, rf"(.*\.)?({key})$")  # as peft matches
            if not any(pattern.match(name) for name in chosen):
                raise ValueError(f"{field}: {key!r} matches no adapted layer; adapted: {_few(chosen)}")


def _linear(module: nn.Module) -> str:
    linear = {n.split(".", 2)[-1] for n, m in module.named_modules() if isinstance(m, nn.Linear) and "." in n}
    return ", ".join(sorted(linear))


def _few(names: Any) -> str:
    every = list(names)
    return ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")
