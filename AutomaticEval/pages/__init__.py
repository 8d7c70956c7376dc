"""What a page of a run shows: gathered from the run, from another one, and from result files."""
