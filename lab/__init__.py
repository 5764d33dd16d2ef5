"""The lab: a small rendered world, the embedded model that is trained on it, and the scripts that train and measure."""
