"""How much of a control acts, where and when."""
