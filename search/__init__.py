"""Which trial next, and what was found."""
