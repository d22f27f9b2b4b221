"""Around the loop: a run's folder and log, its result, how it stops, and the fault that can be replayed."""
