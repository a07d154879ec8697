"""Evaluation and expert routing."""
