"""A training set: from pictures and captions to cached latents, contexts and hints, and back."""
