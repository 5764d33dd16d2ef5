"""Training a control: a cached dataset, one straight loop, and what it takes to watch it and to lose nothing."""
