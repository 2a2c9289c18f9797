"""Which linear layers get adapters: names are matched as PEFT matches them."""

import logging
import re
from collections.abc import Mapping, Sequence

from lora_dpo_jax.lora.config import LoraConfig, matches_suffix
from lora_dpo_jax.lora.tree import LayerNames

logger = logging.getLogger(__name__)


def matching_names(names: Sequence[str], config: LoraConfig) -> list[str]:
    """The targets among `names`, matched as PEFT matches them."""
    targets, excluded = config.target_modules, config.exclude_modules
    if targets is None:
        chosen = [name for name in names if name != "lm_head"]
    else:
        chosen = [name for name in names if _matches(name, targets)]
    if config.layer_numbers is not None:
        exact = targets if isinstance(targets, list) else ()
        chosen = [name for name in chosen if name in exact or _layer_number(name, config) in config.layer_numbers]
    return [name for name in chosen if not (excluded and _matches(name, excluded))]


def matching_parameters(names: Sequence[str], config: LoraConfig) -> list[str]:
    """The target parameters among `names`, matched as PEFT matches them: by `target_parameters` alone."""
    return [name for name in names if _matches(name, config.target_parameters or [])]


def matching_layers(names: LayerNames, config: LoraConfig) -> list[str]:
    """All targets, modules and parameters."""
    return matching_names(names.modules, config) + matching_parameters(names.parameters, config)


def check_targets(names: LayerNames, unadaptable: Mapping[str, str], config: LoraConfig, *, tied: bool) -> None:
    """Raises ValueError unless `config` names layers that can be adapted, and names no other layer.

    A pattern that matches no target is only a warning, as PEFT takes it.

    `names` are those of the model's linear layers. `unadaptable` has, by name, the layers that cannot have an adapter,
    with the reason. `tied`: the head of the model is its input embedding.
    """
    wanted = config.target_modules
    if tied and wanted is not None and _matches("lm_head", wanted):
        raise ValueError(
            "lora.target_modules names lm_head, but this model ties its head to the input embedding: merging such an "
            "adapter would change the embedding too (PEFT does so without a warning). Leave lm_head out."
        )
    # Also an error if target_modules is null: otherwise a run would silently leave out layers that it should train.
    if bad := matching_names([*unadaptable], config):
        raise ValueError(
            f"lora.target_modules={wanted!r} includes {_abridged(bad)}: {unadaptable[bad[0]]}. Name it in "
            "lora.exclude_modules, or name only other layers in lora.target_modules"
        )
    modules = names.modules
    for target in config.target_parameters or []:
        if not any(_matches(name, [target]) for name in names.parameters):
            there = ", ".join(_abridged(names.parameters)) or "none, as it has no experts that are gathered"
            raise ValueError(f"lora.target_parameters: {target} matches no parameter of this model; there are: {there}")
    targets = matching_layers(names, config)
    if not targets:
        layers = "" if config.layer_numbers is None else f", layers_to_transform={config.layer_numbers}"
        raise ValueError(
            f"lora.target_modules={wanted!r} (exclude_modules={config.exclude_modules!r}{layers}) matches none of the "
            f"{len(modules)} linear layers: {_abridged(modules)}{_of_parameters(names.parameters)}"
        )
    if isinstance(wanted, list) and (unused := [t for t in wanted if not any(_matches(n, [t]) for n in modules)]):
        raise ValueError(
            f"lora.target_modules: {unused} match no linear layer; there are: {_abridged(modules)}"
            f"{_of_parameters(names.parameters)}"
        )
    if absent := set(config.layer_numbers or ()) - {_layer_number(name, config) for name in modules}:
        there = f"there are no layers {sorted(absent)}; there are: {modules[0]}, ..."
        raise ValueError(f"lora.layers_to_transform: {there}")
    for setting in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, setting):
            if not any(matches_suffix(key, name) for name in targets):
                logger.warning("lora.%s: %r matches no target; there are: %s", setting, key, _abridged(targets))


def _of_parameters(names: Sequence[str]) -> str:
    return f"; and, for lora.target_parameters: {_abridged(names)}" if names else ""


def _matches(name: str, patterns: list[str] | str) -> bool:
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def _layer_number(name: str, config: LoraConfig) -> int | None:
    """The number of a layer in its path, found as PEFT finds it."""
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # Without a pattern, PEFT asks for a name before the one that the number follows.
        before = r"(?:^|.*?\.)" if config.layers_pattern else r".*?\."
        if found := re.match(rf"{before}{pattern}\.(?P<number>\d+)\.", name):
            return int(found["number"])
    return None


def _abridged(names: Sequence[str]) -> list[str]:
    """One name per kind of layer."""
    return list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
