"""Records in and out: folders, text files, tar and Parquet shards; one form for all of them."""
