from torchspan.api import activate as activate
from torchspan.api import deactivate as deactivate
from torchspan.api import register_backport as register_backport
from torchspan.api import register_shim as register_shim
from torchspan.artifacts import Precompile as Precompile
from torchspan.artifacts import load as load
from torchspan.artifacts import precompile as precompile
from torchspan.backports._base import Backport as Backport
from torchspan.core.errors import TorchspanError as TorchspanError
from torchspan.core.report import Report as Report
from torchspan.devices._value import TorchDevice as TorchDevice
from torchspan.devices._value import keep_cpu as keep_cpu
from torchspan.diagnosis.profiling import CompileProfile as CompileProfile
from torchspan.diagnosis.profiling import profile_compile as profile_compile
from torchspan.jobs.budget import Budget as Budget
from torchspan.strategies import compile_bounded as compile  # noqa: F401
from torchspan.strategies import partial_compile as partial_compile
from torchspan.strategies import region as region
from torchspan.strategies import safe_compile as safe_compile
from torchspan.strategies import smart_compile as smart_compile

__version__: str
