"""Invented passages."""
