"""Predictions held against measurement: whole steps, their components, hardware counters."""
