"""Operators: one file per family with its schema, fake, torch reference, autograd.Function and functions."""
