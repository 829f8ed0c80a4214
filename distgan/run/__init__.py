"""A run around its steps: its folder, what is saved and logged, and the guard."""
