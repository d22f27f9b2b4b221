"""Training: data, optimizers, schedules, checkpoints and the loop. Import the modules by name."""
