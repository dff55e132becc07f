"""A pass that fails leaves one file, from which a fresh process runs it again and fails alike."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from torchspan.cli import main
from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import Pass, PassContext
from torchspan.passes._instruments import FailureFile
from torchspan.passes._pipeline import Pipeline
from torchspan.passes._recorded import groups_of, written_failure
from torchspan.passes._replay import Recording, load_recording
from torchspan.passes.transformer_block_bucketing import TransformerBlockBucketing
from torchspan.private import distributed

C10D = "_c10d_functional"

# A pass of another package: it takes out the first wait, and asks its context's process groups how many they are.
BROKEN = """
from dataclasses import dataclass
from typing import ClassVar
import torch.distributed as dist
from torchspan.passes._base import Pass, editable

@dataclass(frozen=True)
class Unwaited(Pass):
    name: ClassVar[str] = "unwaited"
    summary: ClassVar[str] = "takes out a wait"
    at: int = 0
    def run(self, graph, context):
        module = editable(graph)
        waits = [node for node in module.graph.nodes if "wait_tensor" in str(node.target)]
        wait = waits[self.at]
        assert dist.distributed_c10d._resolve_process_group(wait.args[0].args[-1]).size() == 4
        wait.replace_all_uses_with(wait.args[0])
        module.graph.erase_node(wait)
        module.recompile()
        return graph.with_module(module, "unwaited")

PASS = Unwaited
"""


@pytest.fixture
def other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package that brings the pass ``unwaited``."""
    (tmp_path / "unwaited_pass.py").write_text(BROKEN)
    info = tmp_path / "unwaited-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unwaited\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchspan.passes]\nunwaited = unwaited_pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


GROUPS = {"tp": [0, 1], "dp": [0, 2, 4, 6]}


@pytest.fixture
def small() -> Iterator[Graph]:
    """Two parameters of a block gathered over four ranks, and their product, on rank 0 of eight that send nothing."""
    distributed.start_fake_groups(0, GROUPS)
    recording = Recording("", error="", torch="", strict=False, kind="forward", notes=(), rank=0, groups=GROUPS, report=())
    size = recording.symbol("u0", least=0, most=64)
    recording.meta(custom={"module": "layers.0.wq"}, partitioner_tag="is_forward")
    inputs = [
        recording.placeholder(name, name, gives=gives, kind=kind, stands_for=f"layers.0.{name}")
        for name, gives, kind in (("wq", "f32[4, 3]", "parameter"), ("wk", "f32[4, 3]", "parameter"), ("n", "i64[]", "input"))
    ]
    gathers = [
        recording.call(f"gather_{i}", f"{C10D}.all_gather_into_tensor.default", inputs[i], 4, "dp", gives="f32[16, 3]")
        for i in (0, 1)
    ]
    waits = [recording.call(f"wait_{i}", f"{C10D}.wait_tensor.default", gathers[i], gives="f32[16, 3]") for i in (0, 1)]
    recording.meta()
    turned = recording.call("turned", "aten.t.default", waits[1], gives="f32[3, 16] stride (1, 3)", seq_nr=4)
    product = recording.call("product", "aten.mm.default", waits[0], turned, gives="f32[16, 16]")
    summed = recording.call("summed", f"{C10D}.all_reduce.default", product, "sum", "tp", gives="f32[16, 16]")
    result = recording.call("result", f"{C10D}.wait_tensor.default", summed, gives="f32[16, 16]")
    number = recording.call("number", "aten.item.default", inputs[2], gives="size u0", finds_out=True)
    twice = recording.call("twice", "_operator:mul", number, 2, gives="size 2*u0")
    ones = recording.call("ones", "aten.full.default", [twice], float("inf"), dtype=torch.float32, gives="f32[2*u0]")
    recording.returns([("output", "0", result), ("output", "1", ones)])
    assert size is not None
    yield recording.graph
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def failed(other_package: Path, small: Graph) -> tuple[PassError, Path]:
    """What the pass raised, and the file that it left."""
    import unwaited_pass

    with pytest.raises(PassError) as caught:
        Pipeline((unwaited_pass.Unwaited(at=1),)).run(small, instruments=[FailureFile(other_package)])
    return caught.value, other_package / "torchspan-pass-failure-unwaited.py"


def test_a_fresh_process_without_model_or_ranks_fails_alike(failed: tuple[PassError, Path], run_python: Any) -> None:
    error, path = failed
    message, _, where = str(error).partition("; run it again on the graph before it: ")
    assert where == f"torchspan passes --replay {path}"
    assert [file.name for file in path.parent.glob("torchspan-pass-failure-*")] == [path.name]
    again = run_python(
        None, "-m", "torchspan", "passes", "--replay", str(path), env={"PYTHONPATH": _with_source(path.parent)}, expect=1
    )
    assert "pass unwaited{at=1} on a graph of" in again.stdout
    assert message in " ".join(again.stderr.split())
    assert (
        "turned reads the collective gather_1 (_c10d_functional.all_gather_into_tensor.default) before any wait_tensor"
        in message
    )


def _with_source(folder: Path) -> str:
    import torchspan

    return f"{folder}:{Path(torchspan.__file__).parents[1]}"


def test_the_file_says_what_failed_in_words_that_a_person_reads(failed: tuple[PassError, Path]) -> None:
    text = failed[1].read_text()
    assert text.startswith('"""A graph on which the pass unwaited failed, for')
    assert "wq = RECORDING.placeholder('wq', 'wq', gives='f32[4, 3]', kind='parameter', stands_for='layers.0.wq')" in text
    assert "RECORDING.meta(custom={'module': 'layers.0.wq'}, partitioner_tag='is_forward')" in text
    assert "turned = RECORDING.call('turned', 'aten.t.default', wait_1, gives='f32[3, 16] stride (1, 3)', seq_nr=4)" in text
    assert "[twice], float('inf'), dtype=torch.float32, gives='f32[2*u0]')" in text
    assert "u0 = RECORDING.symbol('u0', least=0, most=64)" in text
    assert "RECORDING.returns([\n    ('output', '0', result),\n    ('output', '1', ones),\n])" in text


def test_a_graph_is_the_same_after_it_was_written_and_read(small: Graph, tmp_path: Path) -> None:
    text = written_failure(TransformerBlockBucketing(), small, PassError("x"), PassContext())
    after = Pipeline.parse("transformer_block_bucketing").run(small)
    assert after.num_collectives()["all_gather_into_tensor"] == 1
    dist.destroy_process_group()
    (tmp_path / "failure.py").write_text(text)
    recording = load_recording(tmp_path / "failure.py")
    again = recording.graph
    assert again.module.code == small.module.code
    assert (again.inputs, again.outputs, again.kind) == (small.inputs, small.outputs, small.kind)
    assert recording.replay().module.code == after.module.code
    distributed.start_fake_groups(0, GROUPS)
    assert groups_of(again.module) == groups_of(small.module) == {"dp": [0, 2, 4, 6], "tp": [0, 1]}
    assert written_failure(TransformerBlockBucketing(), again, PassError("x"), PassContext()) == text


def test_a_pass_that_does_not_fail_here_is_told_as_such(
    small: Graph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written_failure(TransformerBlockBucketing(), small, PassError("it was late"), PassContext())
    dist.destroy_process_group()
    (tmp_path / "failure.py").write_text(text)
    assert main(["passes", "--replay", str(tmp_path / "failure.py")]) == 0
    assert "it does not fail here; where it was recorded: it was late" in " ".join(capsys.readouterr().out.split())


@dataclass(frozen=True)
class Raises(Pass):
    """Raises what a pass raises by mistake."""

    name: ClassVar[str] = "raises/badly"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        raise KeyError("x")


def test_whatever_a_pass_raises_is_told_as_the_passs(small: Graph, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"^pass raises/badly failed: KeyError: 'x'; run it again .*failure-raises-badly.py$"):
        Pipeline((Raises(),)).run(small, instruments=[FailureFile(tmp_path)])
    with pytest.raises(PassError, match=r"^pass raises/badly failed: KeyError: 'x'$"):
        Pipeline((Raises(),)).run(small)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no file .* to replay; expected one that a failing pass left"), ("x = 1", "records no pass; expected a file")],
)
def test_what_is_no_such_file_is_told(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "failure.py").write_text(textwrap.dedent(text))
    with pytest.raises(InputError, match=message):
        load_recording(tmp_path / "failure.py")
