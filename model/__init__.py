"""The maths of all-attention language models and the bundle they ship in; knows no HTTP and no optimizer."""
