"""One run on several machines by way of Ray (docs/cluster.md). Nothing else of the package imports Ray."""
