"""Who runs next and which page is whose, in plain Python: no arrays, no devices."""
