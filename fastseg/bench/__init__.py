"""Timing of operators and networks beside torch, with results in files and reports made of them."""
