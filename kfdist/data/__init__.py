"""Data: tasks by name or of your own, and how their examples reach the ranks."""

from kfdist.data.objective import Classification, Objective
from kfdist.data.reading import CorruptExample
from kfdist.data.task import DataSet, Examples

__all__ = ["Classification", "CorruptExample", "DataSet", "Examples", "Objective"]
