"""``torch._export.config``: options of torch.export; what this torch's export does not do cannot be turned on."""

from __future__ import annotations

import importlib

from torchspan.backports._fixed_options import FixedOptions, lacks_module, patching

_PLACE = "torch._export.config"

BACKPORT = FixedOptions(
    name="export_config",
    summary="options of torch.export, as a module: torch._export.config",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/_export/config.py",
    differs=(
        "use_new_tracer_experimental can be set, and export captures with the one tracer that this torch has; the others keep "
        "the value that says what this torch does; error_on_lifted_constant_tensors is False"
    ),
    is_module=True,
    names={
        "use_new_tracer_experimental": lambda: True,
        "use_legacy_dynamo_graph_capture": lambda: True,
        "detect_non_strict_fake_tensor_leaks": lambda: False,
        "error_on_lifted_constant_tensors": lambda: False,
        "enable_auto_functionalized_v2_for_export": lambda: True,
        "patch": lambda: patching(_PLACE),
    },
    elsewhere={"torch._export": {"config": lambda: importlib.import_module(_PLACE)}},
    refusals={
        "use_legacy_dynamo_graph_capture": "this torch's export has no other way to capture",
        "detect_non_strict_fake_tensor_leaks": "this torch's fake tensors are not counted",
        "error_on_lifted_constant_tensors": "this torch's export does not look for them",
        "enable_auto_functionalized_v2_for_export": "torch._inductor.config.enable_auto_functionalized_v2 decides that here",
    },
    lacks=lacks_module(_PLACE),
)
