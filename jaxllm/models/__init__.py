"""The decoder and what turns a checkpoint of each family into it."""
