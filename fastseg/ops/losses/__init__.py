"""Losses over every pixel of a map, and what reads logits as they do."""
