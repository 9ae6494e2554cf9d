"""From logits to drawn tokens: parameters, penalties, filters, the draw."""
