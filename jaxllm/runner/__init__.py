"""What computes: batches, compiled programs and the processes that run them."""
