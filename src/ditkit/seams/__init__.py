"""What a method may touch in a model, one file a seam. Nothing here names a paper."""
