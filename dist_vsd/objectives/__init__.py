"""The lineage, one file a row: what pulls a particle towards the prior."""
