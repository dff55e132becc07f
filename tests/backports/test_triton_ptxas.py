"""Triton compiles for GPUs that its own ptxas does not know, with another; no GPU is needed to see it."""

from __future__ import annotations

import importlib.util
import json

import pytest

from torchspan.backports import triton_ptxas

KERNELS = """
import json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def add(x, y, out, n, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)

@triton.jit
def dot(x, y, out, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    at = row[:, None] * SIZE + row[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))

@triton.jit
def tma(x, out, SIZE: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [1024, 1024], [1024, 1], [SIZE, SIZE])
    target = tl.make_tensor_descriptor(out, [1024, 1024], [1024, 1], [SIZE, SIZE])
    target.store([0, 0], source.load([0, 0]))

SOURCES = {
    "add": (add, {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "SIZE": "constexpr"}, 1024),
    "dot": (dot, {"x": "*fp16", "y": "*fp16", "out": "*fp32", "SIZE": "constexpr"}, 64),
    "tma": (tma, {"x": "*fp16", "out": "*fp16", "SIZE": "constexpr"}, 64),
}

def compile(name, capability):
    function, signature, size = SOURCES[name]
    source = ASTSource(fn=function, signature=signature, constexprs={"SIZE": size})
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    used = [word for word in ("wgmma", "tcgen05", "tensormap") if word in done.asm["ptx"]]
    return len(done.asm["cubin"]), done.asm["ptx"].split(".target ")[1].split()[0], used
"""
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch came without triton")
own = {name for path in triton_ptxas.installed_ptxas() if "/triton/" in path for name in triton_ptxas.known_architectures(path)}
has_newer = triton_ptxas.find_ptxas("sm_103a", triton_ptxas.installed_ptxas()) is not None


def is_lacking() -> bool:
    from torchspan.backports._base import get_backport
    from torchspan.backports._base import is_lacking as lacks

    return lacks(get_backport("triton_ptxas"))


@needs_triton
@pytest.mark.skipif(not has_newer, reason="no ptxas here knows sm_103a")
def test_kernels_for_every_architecture_are_assembled_with_their_suffix(run_python, tmp_path) -> None:
    process = run_python(
        KERNELS
        + """
import torchspan
with torchspan.activate(device="off") as environment:
    made = {f"{name} {arch}": compile(name, arch) for arch in (90, 100, 103, 120, 121) for name in SOURCES}
    print(json.dumps([made, [d.subject for d in environment.report.decisions]]))
from triton.backends.nvidia import compiler
assert not hasattr(compiler.get_ptxas, "__wrapped__")
""",
        env={"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
    )
    assembled, decisions = json.loads(process.stdout.splitlines()[-1])
    for name, (size, target, _) in assembled.items():
        assert size > 1000 and target == f"sm_{name.split()[1]}a", (name, size, target)
    assert "wgmma" in assembled["dot 90"][2] and "tcgen05" in assembled["dot 103"][2] and "tensormap" in assembled["tma 121"][2]
    assert set(decisions) == {f"ptxas for {name}" for name in ("sm_103a", "sm_121a") if is_lacking() and name not in own}


@needs_triton
def test_where_no_ptxas_knows_the_gpu_the_error_says_what_brings_one(run_python, tmp_path) -> None:
    if not is_lacking():
        pytest.skip("triton's own ptxas knows it")
    process = run_python(
        KERNELS
        + """
import torchspan
from torchspan.backports import triton_ptxas
own = list(triton_ptxas.installed_ptxas())[0]
assert triton_ptxas.find_ptxas("sm_999a", [own, "no_such_ptxas"]) is None
with torchspan.activate(device="off"):
    print(compile("add", 100))
    try:
        compile("add", 999)
    except torchspan.TorchspanError as error:
        print(error)
""",
        env={"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert "no ptxas here knows sm_999a: triton's own (CUDA 1" in process.stdout and "nvidia-cuda-nvcc" in process.stdout


def test_a_program_that_is_no_ptxas_knows_nothing() -> None:
    assert triton_ptxas.known_architectures("no such program") == frozenset()
    assert triton_ptxas.known_architectures("/bin/true") == frozenset()
