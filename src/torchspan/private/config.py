"""What torchspan uses of torch's modules of settings: dynamo's, AOTAutograd's and inductor's are made alike."""

from __future__ import annotations

from typing import Any

from torchspan.private.names import find, names_in

NAMES = (*names_in("torch.utils._config_module", "SubConfigProxy", "_Config", "_ConfigEntry"),)


def __getattr__(name: str) -> Any:
    """A listed name, imported when it is asked for."""
    return find(NAMES, name)


def is_set_by_program(module: Any, name: str, value: Any) -> bool:
    """Whether a setting has neither torch's own value nor one that the environment's variables give it."""
    entry = module._config[name]
    return value not in (entry.default, entry.env_value_default, entry.env_value_force)


def config_code() -> str:
    """Python text that sets dynamo's, AOTAutograd's and inductor's settings that are not as torch has them by default."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    configs = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)
    lines = [line for config in configs for line in config.codegen_config().splitlines()]
    settings = [line for line in lines if line and not any(name in line for name in ("compile_threads", "fx_graph_cache"))]
    imports = sorted({f"import {line.partition('.config.')[0]}.config" for line in settings if ".config." in line})
    return "\n".join([*imports, *settings])
