"""What adapters do to weights: the formulas of each kind, and layers that carry them."""
