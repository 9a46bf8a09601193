"""The commands, one a file, that cli.py puts together.

What several commands share: options.py, reading.py (texts and packets they are given), console.py (where they print),
answers.py (of ask and answer), measuring.py (of eval and curve).
"""
