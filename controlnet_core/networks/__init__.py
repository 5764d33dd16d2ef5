"""The networks: the UNet, what controls it, and where the two meet."""
