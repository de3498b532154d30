"""The engine: plain Python that decides, array code that computes, and the loop and faces over both."""
