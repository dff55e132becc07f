"""``AOTCompiledArtifact`` and ``RegionalOutputCode``: names of artifacts that this torch's compiler does not make."""

from __future__ import annotations

import importlib

from torchspan.backports._base import Backport, unavailable

_PLACE = "torch._inductor.standalone_compile"
_CAUSE = "this torch's inductor has no bundle of a compiled function that could be saved by itself"
_INSTEAD = "use torchspan.precompile, or CompiledArtifact"


def _cached() -> object:
    """What one of torch's cache entries is called beside other artifacts: this torch's only one."""
    return vars(importlib.import_module(_PLACE))["CompiledArtifact"]


BACKPORT = Backport(
    name="aot_compiled_artifact",
    summary="artifacts of compiled functions that isinstance asks for: AOTCompiledArtifact, RegionalOutputCode",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/_inductor/standalone_compile.py",
    differs="nothing is an instance of them; to make one is an error",
    names={
        "AOTCompiledArtifact": lambda: unavailable(
            "torch._inductor.standalone_compile.AOTCompiledArtifact", _CAUSE, "2.10.0", _INSTEAD
        ),
        "CacheCompiledArtifact": _cached,
    },
    elsewhere={
        "torch._inductor.output_code": {
            "RegionalOutputCode": lambda: unavailable(
                "torch._inductor.output_code.RegionalOutputCode", _CAUSE, "2.10.0", _INSTEAD
            )
        }
    },
)
