"""Work shard by shard: the index folder, its tables, and the runner."""
