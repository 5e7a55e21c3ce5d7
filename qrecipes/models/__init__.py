"""Models: building them, loading weights into them, and looking at their parts."""
