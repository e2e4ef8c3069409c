"""What every evaluation does with its results: settings that are kept, batches that are resumed, summaries."""
