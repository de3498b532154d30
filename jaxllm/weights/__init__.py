"""From files to parameters on the mesh, and back into files."""
