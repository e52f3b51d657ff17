"""Data sets. Importing this needs numpy only; each source names the extra it needs."""

from jrobust.data._dataset import Dataset
from jrobust.data._digits import Splits, digits

__all__ = ["Dataset", "Splits", "digits"]
