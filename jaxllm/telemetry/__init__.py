"""What the engine measures of itself: tokens, FLOPs, bytes and times per iteration."""
