"""How packets travel."""
