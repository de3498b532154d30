"""The same decoder with a loss: data, steps, checkpoints, and folders that the next command serves."""
