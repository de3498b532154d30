"""A deployment on paper: what fits, what it sends and how fast it can be at best."""
