"""The database's own rules, on one that is small enough to be read, and facts of the real one."""

from __future__ import annotations

import pytest

from torchspan.scan._names import DATABASE, Names

SMALL = """2.8.0 2.9.1 2.10.0
\0torch\t7\t0\t
Base\t\t:
.__init__\t\t(a
.old\t3\t(
C\t\t:torch.Base
.new\t4\t
D\t\t:torch.Base
.__init__\t\t(+b
both\t\t(~x
f\t1\t(a,*,b
f\t6\t(a,*,b,c
m\t6\t=torch.sub
instance\t\t@torch.C
more\t\t(a,**
\0torch.both\t7\t0\t
inside\t6
\0torch.opened\t7\t1\t
late\t4
\0torch.sub\t6\t0\t
loop\t\t=torch.sub.loop
own\t\t=torch.sub.own
x\t4
\0torch.sub.loop\t6\t0\t
late\t4
"""


@pytest.fixture(scope="module")
def small() -> Names:
    return Names(SMALL)


@pytest.fixture(scope="module")
def names() -> Names:
    return Names.load()


@pytest.mark.parametrize(
    ("name", "mask", "judged"),
    [
        ("torch.f", 0b111, "torch.f"),
        ("torch.f.beyond", 0b111, "torch.f"),
        ("torch.sub", 0b110, "torch.sub"),
        ("torch.sub.x", 0b100, "torch.sub.x"),
        ("torch.m.x", 0b100, "torch.m.x"),
        ("torch.sub.own", 0b110, "torch.sub.own"),
        ("torch.sub.loop.late", 0b100, "torch.sub.loop.late"),
        ("torch.C.new", 0b100, "torch.C.new"),
        ("torch.C.old", 0b011, "torch.C.old"),
        ("torch.instance.new", 0b100, "torch.instance.new"),
        ("torch.opened.late", 0b101, "torch.opened.late"),
        ("torch.both.inside", 0b110, "torch.both.inside"),
        ("torch.absent.x", 0, "torch.absent"),
        ("torch.f.__doc__", 0b111, "torch.f"),
        ("torch.__file__", 0b111, "torch.__file__"),
    ],
)
def test_a_name_is_looked_up_through_aliases_classes_and_instances(small: Names, name: str, mask: int, judged: str) -> None:
    result = small.look_up(name)
    assert (result.mask, result.name) == (mask, judged)


def test_what_an_open_module_lacks_tells_nothing(small: Names) -> None:
    assert not small.look_up("torch.opened.never").is_known
    assert small.look_up("torch.never").is_known


@pytest.mark.parametrize(
    ("function", "keyword", "mask"),
    [
        ("torch.f", "b", 0b111),
        ("torch.f", "c", 0b110),
        ("torch.C", "a", 0b111),
        ("torch.D", "a", 0b111),
        ("torch.D", "b", 0b111),
        ("torch.D", "c", 0),
        ("torch.more", "anything", 0b111),
        ("torch.instance", "anything", 0b111),
    ],
)
def test_a_keyword_is_accepted_by_its_release(small: Names, function: str, keyword: str, mask: int) -> None:
    assert small.accepting(function, keyword).mask == mask


def test_releases_are_said_in_words(small: Names) -> None:
    texts = [small.text(mask) for mask in (0b111, 0b110, 0b001, 0b101, 0b100, 0)]
    assert texts == ["2.8 and newer", "2.9 and newer", "2.8", "2.8, 2.10", "2.10", "no release"]


FACTS = {
    "torch.nn.attention.varlen": "2.10 and newer",
    "torch._dynamo.aot_compile.AOTCompileUnpickler": "2.11 and newer",
    "torch._dynamo.aot_compile.AOTCompiledFunction.serialize": "2.9 and newer",
    "torch._dynamo.precompile_package.PrecompileSession": "2.15",
    "torch._functorch._aot_autograd.autograd_cache.BundledAOTAutogradCacheEntry": "2.8 to 2.9",
    "torch._functorch.aot_autograd.compile_to_python": "2.14 and newer",
    "torch._higher_order_ops.inductor_compiled_code": "2.10 and newer",
    "torch._inductor.config.wrap_inductor_compiled_regions": "2.10 and newer",
    "torch._inductor.fx_passes.overlap_manual_scheduling._move_overlap_nodes": "2.13 and newer",
    "torch._inductor.standalone_compile.AOTCompiledArtifact": "2.10 and newer",
    "torch._dynamo.eval_frame.OptimizedModule._aot_compile": "2.10 and newer",
    "torch.compiler.precompile": "2.14 and newer",
    "torch.distributed.device_mesh.DeviceMesh._unflatten": "2.10 and newer",
    "torch.optim.swap_in_optimizer_params_and_state": "2.13 and newer",
    "torch.utils._debug_mode.DebugMode": "2.10 and newer",
    "torch.Precompile": "no release",
    "torch._dynamo.exc.FullGraphCaptureError": "no release",
    "torch.backends.cuda.matmul.fp32_precision": "2.9 and newer",
    "torch.float8_e8m0fnu": "2.7 and newer",
    "torch.distributed._tensor.experimental.local_map": "2.6 and newer",
    "torch.cuda.FloatTensor": "2.6 and newer",
    "torch.ops.aten.mm.default": "2.6 and newer",
    "torch.ops.aten.no_such_operator": "2.6 and newer",  # aten takes more than the files tell
    "torch.sym_sqrt": "2.6 and newer",
    "torch.Tensor.untyped_storage": "2.6 and newer",
}


@pytest.mark.once
@pytest.mark.parametrize("name", FACTS)
def test_the_database_knows_what_was_measured(names: Names, name: str) -> None:
    """Names that were read off released torches by importing them."""
    result = names.look_up(name)
    assert (names.text(result.mask) if result.is_known else "2.6 and newer") == FACTS[name]


@pytest.mark.once
@pytest.mark.parametrize(
    ("function", "keyword", "releases"),
    [
        ("torch.nn.attention.flex_attention.flex_attention", "return_aux", "2.9 and newer"),
        ("torch.distributed.checkpoint.async_save", "async_stager", "2.9 and newer"),
        ("torch.optim.AdamW", "fused", "2.6 and newer"),
        ("torch.nn.Linear", "bias", "2.6 and newer"),
        ("torch.nn.functional.scaled_dot_product_attention", "enable_gqa", "2.6 and newer"),
    ],
)
def test_the_database_knows_arguments(names: Names, function: str, keyword: str, releases: str) -> None:
    assert names.text(names.accepting(function, keyword).mask) == releases


@pytest.mark.once
def test_the_database_is_small_enough_to_ship(names: Names) -> None:
    assert DATABASE.stat().st_size < 1_000_000
    assert names.minors == tuple(f"2.{minor}" for minor in range(6, 16))
