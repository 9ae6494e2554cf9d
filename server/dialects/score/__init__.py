"""POST /score: log-probabilities and perplexities of texts."""
