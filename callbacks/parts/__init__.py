"""What callbacks are made of: shared reading, grounding and drawing, and the work behind single callbacks."""
