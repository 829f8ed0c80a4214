"""One run, around its steps."""
