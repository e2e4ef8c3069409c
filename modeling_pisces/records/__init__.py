"""Records of somebody's data: what a path holds, cut into input shards, read one by one in one form."""
