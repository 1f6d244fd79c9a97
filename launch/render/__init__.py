"""One typed plan of a run on a cluster, and what each target is told of it."""
