"""Messages between all pixels of a fully connected CRF."""
