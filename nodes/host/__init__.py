"""The one place that imports the host: its samplers, its model management, its folders."""
