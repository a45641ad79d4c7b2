"""Pictures by a sentence or by another picture, in any number of shards."""
