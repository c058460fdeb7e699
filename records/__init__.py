"""What crosses the edge of the program: files as they are written, what they hold, and what made them."""
