"""Maps of boxes pasted into one canvas."""
