"""Memory as data: regions, dirty sets, page hashes, page batches and the image digest. Pure: numpy, no I/O."""
