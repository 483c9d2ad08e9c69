"""Features of a frozen backbone: the extractor, and the cache they are kept in."""
