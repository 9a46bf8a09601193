"""The commands, one a file, that cli.py puts together; only ``train`` is beside what it runs, in training/command.py.

What several commands share: options.py, reading.py (texts and packets they are given), console.py (where they print),
answers.py (of ask and answer), measuring.py (of eval and curve).
"""
