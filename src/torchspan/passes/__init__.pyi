from torchspan.passes._base import Pass as Pass
from torchspan.passes._base import PassContext as PassContext
from torchspan.passes._base import Stage as Stage
from torchspan.passes._base import editable as editable
from torchspan.passes._base import refuse_writes as refuse_writes
from torchspan.passes._pipeline import Pipeline as Pipeline
from torchspan.passes._pipeline import describe_passes as describe_passes
