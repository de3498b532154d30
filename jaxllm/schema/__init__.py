"""Request and response bodies, and what makes one invalid."""
