"""Which dim lies on which mesh axis: rule files, meshes, and what the compiled program makes of them."""
