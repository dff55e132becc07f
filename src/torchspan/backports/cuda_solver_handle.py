"""``torch.cuda.current_solver_handle``: the handle of cuSOLVER, which this torch does not give out."""

from __future__ import annotations

from torchspan.backports._base import Backport, unavailable

BACKPORT = Backport(
    name="cuda_solver_handle",
    summary="the handle of cuSOLVER, for libraries of one's own: torch.cuda.current_solver_handle, which is refused",
    target="torch.cuda",
    since="2.13.0",
    upstream="https://github.com/pytorch/pytorch/tree/v2.13.0/torch/cuda/__init__.py",
    differs="this torch gives no handle of cuSOLVER out: its use is an error that says so",
    names={
        "current_solver_handle": lambda: unavailable(
            "torch.cuda.current_solver_handle", "this torch gives no handle of cuSOLVER out", "2.13.0", "use torch.linalg"
        )
    },
)
