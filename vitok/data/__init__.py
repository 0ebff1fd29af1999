"""Sources of pictures and clips with random access, and the training batches drawn from them."""
