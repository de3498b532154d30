"""The fleet on paper: the engine's own loop, scheduler and page pools on modelled devices, by a virtual clock."""
