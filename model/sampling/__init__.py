"""From logits to drawn tokens: sampling parameters, penalties, filters and the draw."""
