"""Dense to thin and back, in place."""

from thintune.convert.dense_to_thin import convert_
from thintune.convert.merge import merge_
from thintune.convert.report import ConversionReport, LayerReport
from thintune.convert.trainable import make_trainable_

__all__ = ["ConversionReport", "LayerReport", "convert_", "make_trainable_", "merge_"]
