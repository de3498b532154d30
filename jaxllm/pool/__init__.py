"""Many models on one memory, switched between tokens (Aegaeon, Xiang et al. 2025)."""
