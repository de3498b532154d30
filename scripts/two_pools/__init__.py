"""What `scripts/drive_pools.py` does, one file for each of its commands."""
