"""The paper's claims, tried on the embedded model: one file for each, the trainings that they share in `runs`."""
