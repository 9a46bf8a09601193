"""Honest measurement: tasks, metrics, controls and the runner that puts them side by side."""
