"""Where a parameter lives, and work divided over processes: meshes, collectives and sharded parameters."""
