"""Batch norm + ReLU, alone or with max-pooling or max-unpooling."""
