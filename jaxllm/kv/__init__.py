"""The KV pages: their arrays on the device and what carries pages to host and disk."""
