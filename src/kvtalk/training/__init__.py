"""Fit adapters: data (texts.py), and one readable file for each adapter."""
