"""Settings of a run: declared in `settings`, read in `reading`, older forms in `lineage`."""
