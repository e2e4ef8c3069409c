"""How each kind of file becomes records: JSON, tables, Parquet, tar shards."""
