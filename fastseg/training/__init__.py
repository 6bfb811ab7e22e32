"""Training and prediction: what `fastseg train`, `fastseg segment` and `fastseg demo` do.

- config, runs: the configuration of a run; starting and resuming one.
- trainer, batches, class_weights, interrupt: the training loop.
- data: datasets, and reading of images and masks.
- networks, checkpoint: networks by name, and the file with their weights.
- metrics: scores from a confusion matrix.
- segmenter, instance_wise, segment_files: predictions of a trained network.
- drawing: figures of predictions and of a run.
- comparison: a plain network and its swapped copy in training.
- device: the device of a run.
"""
