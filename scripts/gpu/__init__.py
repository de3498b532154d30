"""What `scripts/gpu_check.py` does: its parts, and the report."""
