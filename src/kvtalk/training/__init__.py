"""Fit adapters: texts (texts.py), batches of them by step (batches.py), the loop of all trainings (loop.py), and for
each kind of adapter one file that says what is learned (translator.py; lora.py for the baseline)."""
