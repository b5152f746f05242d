"""Dense to thin and back, in place."""

from thintune.convert.dense_to_thin import convert_
from thintune.convert.merge import merge_
from thintune.convert.report import ConversionReport, LayerReport

__all__ = ["ConversionReport", "LayerReport", "convert_", "merge_"]
