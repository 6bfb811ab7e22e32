"""Segmentation networks written as people write them, small: none knows of fastseg."""
