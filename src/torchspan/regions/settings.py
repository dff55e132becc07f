"""How torch.compile is to be called: its own arguments, as a value that can be sent to another process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchspan.private import dynamo, inductor
from torchspan.regions.entry_point import torch_compile


@dataclass(frozen=True)
class Settings:
    """torch.compile's arguments; `extra` are those that only some versions of torch have."""

    backend: str | Callable[..., Any] = "inductor"
    mode: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fullgraph: bool = False
    dynamic: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    recompile_limit: int | None = None

    @property
    def is_inductor(self) -> bool:
        """Whether what is compiled lies in inductor's caches afterwards."""
        return self.backend == "inductor"

    @property
    def is_plain(self) -> bool:
        """Whether an artifact can hold what is compiled: by inductor, without a mode or options, for static shapes."""
        is_default = self.mode in (None, "default") and not self.extra and not self.dynamic
        return self.is_inductor and is_default and dict(self.options) == {"fallback_random": True}

    @property
    def is_random(self) -> bool:
        """Whether compiled code draws other random numbers than eager: inductor's own, without ``fallback_random``."""
        return self.is_inductor and not self.options.get("fallback_random", False)

    @property
    def limit(self) -> int:
        """How many signatures and states of a region are compiled: as asked for, or torch's own limit, at least 8."""
        return self.recompile_limit or max(8, dynamo.compile_limit())

    def to_send(self) -> Settings:
        """The same for another process, which has not registered this one's backends."""
        if isinstance(self.backend, str) and not self.is_inductor:
            return replace(self, backend=dynamo.named_backend(self.backend))
        return self

    @property
    def backend_name(self) -> str:
        """The backend's name, for a Report."""
        return self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", repr(self.backend))

    def compile(self, entry: Callable[..., Any], wrap: Callable[..., Any] | None = None) -> Callable[..., Any]:
        """``torch.compile(entry)`` with these arguments; the backend goes through `wrap` first, where there is one.

        Shapes are static unless `dynamic` is set. Dynamo would make them dynamic after an earlier signature, which the caller's
        process may have seen and the child has not: the two have to compile the same.
        """
        arguments: dict[str, Any] = {"fullgraph": self.fullgraph, "dynamic": bool(self.dynamic), **self.extra}
        if self.is_inductor:
            backend = inductor.backend(self.mode, self.options, bool(self.dynamic))
            arguments["backend"] = wrap(backend) if wrap else backend
        else:
            arguments["backend"] = wrap(dynamo.backend_function(self.backend)) if wrap else self.backend
            if self.mode is not None:
                arguments["mode"] = self.mode
            if self.options:
                arguments["options"] = dict(self.options)
        return torch_compile()(entry, **arguments)
