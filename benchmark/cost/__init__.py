"""What runs cost: speed beside the peers, growth with size, and the share that no faster code can save."""
