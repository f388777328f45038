"""The engine: trio on one side, one decode thread on the other, values in between."""
