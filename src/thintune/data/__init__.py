"""Sources of labelled images, cut into training, validation and test splits.

Images stay uint8, or stay files; only the selected ones are held, once. They become resized, normalised floats a
micro-batch at a time:

    splits = load_splits(DataConfig(name="digits", image_size=28), Normalization(mean=(0.5,), std=(0.5,)))
    for batch in epoch_batches(len(splits.train), batch_size=32, seed=0, epoch=0):
        for rows in micro_batches(batch, 8):
            images, labels = splits.train.images(rows), splits.train.labels[rows]

Legend: B images of a (micro-)batch, n images of a split, H and W stored height and width, S asked height and width.
"""

from thintune.data.batches import epoch_batches, micro_batches
from thintune.data.images import Normalization, Split
from thintune.data.splits import Splits, load_splits

__all__ = ["Normalization", "Split", "Splits", "epoch_batches", "load_splits", "micro_batches"]
