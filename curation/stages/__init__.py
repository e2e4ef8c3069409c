"""The stages that decide, each over all shards of an index, and their order."""
