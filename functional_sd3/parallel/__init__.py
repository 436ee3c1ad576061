"""Placement of parameters, and work divided over processes: meshes, collectives and sharded parameters."""
