"""What a compiled kernel's machine code says of its speed, and a prediction for a shape on a card."""

from nvfp4dsl.inspect.report import Report, inspect
from nvfp4dsl.inspect.shapes import Prediction, predict

__all__ = ["Prediction", "Report", "inspect", "predict"]
