"""How: clocks, memory, checks before speed, and workers in processes of their own."""
