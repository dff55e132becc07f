"""``import torchspan`` prints nothing, patches nothing, imports no torch and reads none of our variables."""

from __future__ import annotations


def test_import_changes_nothing_and_does_not_import_torch(run_python) -> None:
    process = run_python(
        """
        import sys, os, warnings
        warnings.simplefilter("error")
        meta_path, variables = list(sys.meta_path), dict(os.environ)
        import torchspan
        assert "torch" not in sys.modules, "torch was imported"
        assert sys.meta_path == meta_path and dict(os.environ) == variables
        """,
        env={"TORCHSPAN": "1"},
    )
    assert process.stdout == "" and process.stderr == ""


def test_import_after_torch_replaces_no_attribute_of_it(run_python) -> None:
    process = run_python(
        """
        import torch
        holders = [torch, torch.cuda, torch.Tensor, torch.nn.Module, torch.compiler, torch.fx]
        before = [dict(vars(holder)) for holder in holders]
        import torchspan
        for name in torchspan.__all__:
            getattr(torchspan, name)
        for holder, was in zip(holders, before):
            now = vars(holder)
            assert all(now.get(name) is value for name, value in was.items()), holder
        import sys
        assert "torch._inductor.compile_fx" not in sys.modules and "torch._dynamo.convert_frame" not in sys.modules
        """
    )
    assert process.stdout == "" and process.stderr == ""


def test_without_the_variable_torch_is_untouched(run_python) -> None:
    run_python(
        """
        import sys, torch
        assert "torchspan.api" not in sys.modules
        assert not hasattr(torch, "Precompile")
        """
    )
