"""The maths of all-attention language models and the bundle that stores one; knows no HTTP and no optimizer."""
