"""What a row is and how rows become batches: spec, schema, rows, streams, mixture, collator; files in `readers`."""
