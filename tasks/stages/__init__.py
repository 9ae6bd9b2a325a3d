"""The pipeline's stages, one module each, and the contract that they keep."""
