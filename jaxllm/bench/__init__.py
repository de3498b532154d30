"""Benches: each measures one thing and returns one dictionary."""
