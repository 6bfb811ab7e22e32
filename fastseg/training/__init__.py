"""Training and prediction: what `fastseg train`, `fastseg segment` and `fastseg demo` do.

- config, runs: the configuration of a run; starting and resuming one.
- trainer, optimizers, batches, class_weights, interrupt, logs: the training loop.
- data: datasets. layouts: which mask belongs to which picture. pictures, masks: reading them. data_check: all at once.
- class_names: classes and colours of known data sets.
- networks, checkpoint: networks by name, and the file with their weights.
- metrics: scores from a confusion matrix.
- segmenter, instance_wise, tiles, segment_files: predictions of a trained network.
- drawing: figures of predictions and of a run.
- comparison: a plain network and its swapped copy in training.
- device: the device of a run.
"""
