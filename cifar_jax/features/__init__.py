"""Features of a frozen backbone: the extractor and the feature cache."""
