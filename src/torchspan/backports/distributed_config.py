"""``torch.distributed.config``: options of torch.distributed; what this torch lacks cannot be turned on."""

from __future__ import annotations

from torchspan.backports._fixed_options import FixedOptions, lacks_module, patching

_PLACE = "torch.distributed.config"

BACKPORT = FixedOptions(
    name="distributed_config",
    summary="options of torch.distributed, as a module: torch.distributed.config",
    target=_PLACE,
    since="2.11.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/config.py",
    differs="every option is False, and to turn one on is an error",
    is_module=True,
    names={
        "compile_on_one_rank": lambda: False,
        "use_torchcomms": lambda: False,
        "patch": lambda: patching(_PLACE),
    },
    refusals={  # pipeline_per_edge_p2p came with 2.15, where the rest is torch's own
        "compile_on_one_rank": "a graph of this torch has its own rank's numbers in it",
        "use_torchcomms": "this torch's process groups know no TorchComms",
        "pipeline_per_edge_p2p": "this torch's pipelines send and receive on the group of all their ranks",
    },
    lacks=lacks_module(_PLACE),
)
