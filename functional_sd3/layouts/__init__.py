"""Names of foreign checkpoints <-> ours, as tables of rules with exact inverses, and configs read off shapes."""
