"""What an answer must look like: grammars and JSON schemas, forbidden words, allowed tokens."""
