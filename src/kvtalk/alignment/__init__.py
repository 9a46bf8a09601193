"""Which sharer token stands for which receiver token (tokens.py)."""
