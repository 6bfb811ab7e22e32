"""Times of operators and networks, compared with torch; result files, and reports from them."""
