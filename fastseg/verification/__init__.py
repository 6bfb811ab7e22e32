"""How results are compared with torch's in float64, and the cases that are compared."""
