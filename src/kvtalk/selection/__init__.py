"""What to send: which tokens (tokens.py) of which layers (layers.py)."""
