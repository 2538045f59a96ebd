"""Text files into token shards, and shards into batches."""
