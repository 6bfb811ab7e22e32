"""How results are compared with torch's in float64, and the calls that are compared."""
