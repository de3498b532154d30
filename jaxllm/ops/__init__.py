"""Pure functions over arrays: the mathematics that the decoder's modules call."""
