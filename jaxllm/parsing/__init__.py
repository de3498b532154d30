"""What a model's text means: thoughts, calls and the answer itself, read as it streams in.

events.py says what comes out; formats.py how a model marks things; registry.py which model marks them how.
"""
