"""Artifacts that this torch does not make can be asked for with isinstance, and to make one says what to do."""

from __future__ import annotations

import pytest

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

BACKPORT = REGISTRY.get("aot_compiled_artifact").BACKPORT

pytestmark = pytest.mark.usefixtures("environment")


def test_nothing_is_one_and_to_make_one_is_an_error() -> None:
    from torch._inductor.output_code import RegionalOutputCode
    from torch._inductor.standalone_compile import AOTCompiledArtifact, CacheCompiledArtifact, CompiledArtifact

    assert issubclass(CacheCompiledArtifact, CompiledArtifact)
    assert not isinstance(len, AOTCompiledArtifact) and not isinstance(len, RegionalOutputCode)
    if not is_lacking(BACKPORT):
        assert issubclass(AOTCompiledArtifact, CompiledArtifact)
        return
    for cls in (AOTCompiledArtifact, RegionalOutputCode):
        with pytest.raises(UnsupportedError, match=rf"{cls.__name__}: .* since 2\.10\.0; use torchspan\.precompile"):
            cls(len)
