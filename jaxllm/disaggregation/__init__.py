"""Prefill here, decode there: a request with its computed pages leaves one engine and goes on in another."""
