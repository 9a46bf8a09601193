"""What of the sharer stands for what of the receiver: tokens by the characters they cover, layers by their depth.

tokens.py aligns a text, pieces.py a prompt, readings.py says where in a prompt a text lies, pooling.py gathers and
averages, coverage.py tells how much was aligned, layers.py aligns layers. reencode.py is the published way that they
are measured against; inspection.py shows both.
"""
