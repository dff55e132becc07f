"""Options of the overlap pass, and what it asks of nodes; the pass itself: test_overlap_manual_scheduling.py, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking

OURS = is_lacking(REGISTRY.get("overlap_scheduling").BACKPORT)


def test_its_options_are_inductors_and_are_taken_back(run_python: Any) -> None:
    run_python(
        """
        import torch, torch._inductor.config as config, torchspan
        had, keys = hasattr(config, "aten_distributed_optimizations"), set(config._config)
        portable = config.save_config_portable()
        with torchspan.activate(device="off"):
            added = config.save_config_portable().keys() - portable.keys()
            assert not any(name.startswith("aten_distributed") for name in added), "they are not in the keys of caches"
            from torch._inductor.config import aten_distributed_optimizations as options
            options.collective_bucketing, options.insert_overlap_deps = True, False
            assert config.aten_distributed_optimizations.collective_bucketing is True
            with config.patch({"aten_distributed_optimizations.max_coll_distance": 3}):
                assert options.max_coll_distance == 3
            assert options.max_coll_distance is None
            try:
                options.no_such_option = 1
            except AttributeError as error:
                assert "no_such_option" in str(error)
            else:
                raise AssertionError("an unknown option was taken")
        assert hasattr(config, "aten_distributed_optimizations") == had and set(config._config) == keys
        """
    )


def test_nodes_are_told_apart(environment: Any) -> None:
    from torch._inductor.fx_passes.overlap_scheduling import get_group_name, is_compute_node

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    gather = graph.call_function(torch.ops._c10d_functional.all_gather_into_tensor.default, (x, 2, "group"))
    product = graph.call_function(torch.ops.aten.mm.default, (x, x))
    assert get_group_name(gather) == "group"
    assert is_compute_node(product) and not is_compute_node(gather) and not is_compute_node(x)


@pytest.mark.skipif(not OURS, reason="torch's own writes another way")
def test_paths_of_modules_are_read_as_dynamo_of_any_version_writes_them() -> None:
    from torchspan.backports._overlap import is_inside, plain_path

    for path in ("L['self']._modules['layers']._modules['0'].wq", "L['self'].layers.0.wq", "L['self'].layers['0'].wq"):
        assert plain_path(path) == "layers.0.wq"
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"1": ("L['self'].layers.1", object)}
    assert is_inside(node, ["layers.1"]) and is_inside(node, ["layers"]) and not is_inside(node, ["layers.11"])
    assert is_inside(node, ["a.b"], lambda node: [("a", object), ("a.b.c", object)])
