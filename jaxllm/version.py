"""The version, for whoever names it: packages, servers, processes that meet."""

__version__ = "0.1.0"
