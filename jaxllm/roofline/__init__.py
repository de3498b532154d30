"""What an iteration must cost: chips, FLOPs and bytes, lower bounds of time, and the picture of it."""
