"""The training engine: one resident base, the adapters in training next to it, and passes that they share."""

from loramill.jobs.train.engine.driver import Driver as Driver
from loramill.jobs.train.engine.driver import Ended as Ended
from loramill.jobs.train.engine.engine import TrainingEngine as TrainingEngine
from loramill.jobs.train.engine.parts import Part as Part
from loramill.jobs.train.engine.parts import Together as Together
from loramill.jobs.train.engine.parts import Work as Work
