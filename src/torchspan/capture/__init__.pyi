from torchspan.capture._state import BoundGraph as BoundGraph
from torchspan.capture.joint import capture_joint as capture_joint
from torchspan.capture.train_step import capture_train_step as capture_train_step
